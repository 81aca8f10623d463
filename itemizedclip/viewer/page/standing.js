// Where a calibrated score stands among studies whose truth is known.

/** Words for what a score says: yes or no at fixed sensitivities, and its place among studies with and without the finding. */
function standingText({ score, probability, truths, thresholds, below }) {
  const said = [];
  for (const [wanted, threshold, isAbove] of thresholds) {
    said.push(`${isAbove ? "reaches" : "is below"} ${decimal(threshold, 3)}, which ${percent(wanted)} of studies with it reach`);
  }
  if ("absent" in below) said.push(`higher than ${percent(below.absent)} of studies without it`);
  if ("present" in below) said.push(`higher than ${percent(below.present)} of studies with it`);
  const set = truths.length === 1 ? truths[0] : truths.length ? "undecided" : "like neither";
  return `Calibrated score ${decimal(score, 3)}: ${set}, probability ${percent(probability)} where it was calibrated; ${said.join("; ")}.`;
}

/** Two rails, studies without and with the finding: how far up each of them the score stands. */
function standingBars({ below }) {
  const rails = [["without", "absent"], ["with", "present"]].filter(([, truth]) => truth in below).map(([name, truth]) => {
    const mark = element("i");
    mark.style.left = `${100 * below[truth]}%`;
    return element("span", { className: `rail ${truth}` }, element("span", { className: "dim" }, name), element("span", { className: "line" }, mark));
  });
  return element("span", { className: "rails", "aria-hidden": "true" }, ...rails);
}
