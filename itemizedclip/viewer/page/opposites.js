// Items that deny each other, such as "pleural effusion" and "no pleural effusion": their scores are read against each other.

const DENIAL = /^(?:there (?:is|are) )?(?:no (?:(?:evidence|signs?|indication) of )?|without |absence of |absent |negative for |free of )/;
const DENIED_AFTER = / (?:is|are) (?:absent|not (?:seen|present|visible|identified))$| absent$/;
const AFFIRMATION = /^(?:there (?:is|are) )?(?:(?:evidence|signs?|indication|presence) of )?(?:an? |the )?/;
const AFFIRMED_AFTER = / (?:is|are) (?:present|seen|visible|identified)$| present$/;

/** What a text speaks of, and whether it denies it. */
function claimOf(text) {
  const plain = text.toLowerCase().replace(/\s+/g, " ").replace(/[\s.;!]+$/, "").trim();
  const isDenied = DENIAL.test(plain) || DENIED_AFTER.test(plain);
  const subject = isDenied ? plain.replace(DENIAL, "").replace(DENIED_AFTER, "") : plain;
  return { subject: subject.replace(AFFIRMATION, "").replace(AFFIRMED_AFTER, ""), isDenied };
}

/** The first item that denies what this one says, or says what it denies. */
function oppositeOf(item) {
  const { subject, isDenied } = claimOf(item.text);
  return items.find((other) => {
    const claim = claimOf(other.text);
    return claim.subject === subject && claim.isDenied !== isDenied;
  }) ?? null;
}

/** How an item stands against its opposite, for people. */
function opposedText(item, other) {
  const ahead = item.score - other.score, number = items.indexOf(other) + 1;
  const how = Math.abs(ahead) < 0.0005 ? "level with" : `${decimal(Math.abs(ahead), 3)} ${ahead > 0 ? "above" : "below"}`;
  return `${how} its opposite, item ${number}`;
}
