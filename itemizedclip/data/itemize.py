"""Reports and redundant captions → independent items: sections, lists, sentences, duplicates, normal statements.

The rules only cut and leave out: every item is a stretch of its report, letter for letter (white space of wrapped lines
apart; a topic label such as "Lungs:" may be put back in front). So what they do not know, a language or a style, passes
through unharmed.

    sections     findings and impression are kept, history, technique, comparison left out; headings are never items
    lists        numbered and bulleted lines are one item or more; other lines continue the line above
    sentences    pysbd (Sadvilkar & Neumann 2020), with the abbreviations and units of clinical texts put back together
    semicolons   separate items, unless the part behind depends on a negation in front ("No mass; shift or bleed")
    negations    "No evidence of mass, shift or bleed" stays one item
    duplicates   exact, equal but for case, punctuation and filler words, or judged alike by a text encoder

Axes: N items of a report.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.flags import check
from itemizedclip.runtime.registry import MissingExtraError

Similarity = Callable[[Sequence[str]], np.ndarray]
"""N texts → cosines (N, N) of their embeddings."""

Reason = Literal["section", "heading", "administrative", "exact", "normalised", "semantic", "too short", "unsupported"]
"""Why a stretch of a report is no item."""

Role = Literal["findings", "impression", "other"]

_SECTION_NAMES: dict[Role, tuple[str, ...]] = {
    "findings": (
        "findings", "finding", "report", "body", "observations", "results", "description", "interpretation",
        "befund", "befunde", "résultats", "resultats", "hallazgos", "reperti", "referto", "achados", "bevindingen",
    ),
    "impression": (
        "impression", "impressions", "conclusion", "conclusions", "summary", "opinion", "assessment", "diagnosis",
        "beurteilung", "zusammenfassung", "impresión", "impresion", "conclusión", "conclusioni", "conclusione",
        "conclusão", "conclusie", "findings and impression", "findings/impression", "impression/recommendation",
        "final impression",
    ),
    "other": (
        "history", "clinical history", "clinical information", "clinical indication", "clinical details", "indication",
        "indications", "reason for exam", "reason for examination", "reason for study", "technique", "procedure",
        "protocol", "comparison", "comparisons", "comparison studies", "exam", "examination", "study", "exam type",
        "contrast", "dose", "radiation dose", "limitations", "quality", "recommendation", "recommendations",
        "notification", "communication", "attestation", "signature", "electronically signed by", "dictated by",
        "signed by", "date", "patient", "anamnese", "klinische angaben", "indikation", "fragestellung", "technik",
        "vergleich", "indicación", "indicacion", "técnica", "tecnica", "comparación", "antécédents", "indikatie",
    ),
}  # fmt: skip
_ROLE_OF = {name: role for role, names in _SECTION_NAMES.items() for name in names}
_ANY_SECTION = "|".join(re.escape(name) for name in sorted(_ROLE_OF, key=len, reverse=True))
# A known name that ends with a colon at the beginning of a line, in capitals also within one; or alone on its line.
_HEADING_LINE = re.compile(rf"^[ \t*_#]*({_ANY_SECTION})[ \t*_]*(?::[ \t*_]*|$)", re.IGNORECASE | re.MULTILINE)
_HEADING_INSIDE = re.compile(rf"(?<=[.!?:;\s])({_ANY_SECTION.upper()})[ \t]*:[ \t]*")

_BULLET = re.compile(r"^[ \t]*(?:[-*•◦▪‣–—·]|\(?\d{1,2}[.):]|\(\d{1,2}\)|\(?[a-h][.)])[ \t]+(?=\S)")
_INLINE_NUMBER = re.compile(r"(?:^|(?<=[.;:!?]\s)|(?<=\s\s))\(?(\d{1,2})[.)]\s+(?=[^\s\d])")
_TOPIC = re.compile(r"^([A-Z][A-Za-z/,&()'’ -]{1,48}?):\s+(?=\S)")

_ABBREVIATIONS = (
    "approx", "vs", "sig", "fig", "figs", "no", "nos", "resp", "ca", "ant", "post", "lat", "med", "sup", "inf", "mod",
    "bilat", "incl", "excl", "prob", "poss", "temp", "dr", "prof", "e.g", "i.e", "cf", "st", "ser", "im", "img", "ref",
    "w", "wt", "max", "min", "avg", "est", "neg", "pos", "l", "r", "rt", "lt", "z.b", "bzw", "evtl", "ggf", "v.a",
    "d.h", "segm", "lig", "art", "a", "v", "n", "m", "vol", "diff",
)  # fmt: skip
_UNITS = ("mm", "cm", "ml", "cc", "sec", "min", "hu", "mg", "kg", "yrs", "yr", "mos", "wks")
_ENDS_SHORT = re.compile(rf"(?:^|[\s(\[/])(?:{'|'.join(map(re.escape, _ABBREVIATIONS))})\.\s*$", re.IGNORECASE)
_ENDS_UNIT = re.compile(rf"\d\s*(?:{'|'.join(_UNITS)})\.\s*$", re.IGNORECASE)

_NEGATED = re.compile(
    r"^(?:there (?:is|are|was|were) |again )?(?:no|not|without|absence of|absent|negative for|nor|free of|"
    r"kein|keine|keinen|ohne|pas d|aucun|aucune|sin|senza|nessun|nessuna|sem|geen)\b", re.IGNORECASE,
)  # fmt: skip
_NEGATION_ANYWHERE = re.compile(
    r"\b(?:no|not|without|absent|absence|negative|free of|nor|denies|kein\w*|ohne|sin)\b", re.I
)
_VERB = re.compile(
    r"\b(?:is|are|was|were|has|have|shows?|demonstrates?|appears?|remains?|measures?|seen|noted|extends?|suggests?|"
    r"no|without|unremarkable|normal)\b", re.IGNORECASE,
)  # fmt: skip
_FINITE = re.compile(
    r"\b(?:is|are|was|were|has|have|shows?|demonstrates?|appears?|remains?|measures?)\b", re.IGNORECASE
)
_NORMAL = re.compile(
    r"\b(?:normal|unremarkable|within normal limits|wnl|intact|patent|preserved|clear|symmetric(?:al)?|midline|"
    r"age[- ]appropriate|well[- ]aerated|unauffällig\w*|regelrecht\w*|altersentsprechend\w*)\b", re.IGNORECASE,
)  # fmt: skip
_EXCEPTION = re.compile(
    r"\b(?:except|but|however|although|aside from|apart from|other than|otherwise|besides|with the exception|"
    r"mild|mildly|moderate|moderately|severe|severely|borderline|abnormal|upper limits?|bis auf|außer)\b",
    re.IGNORECASE,
)  # fmt: skip
_WHOLE_NORMAL = re.compile(
    r"^(?:"
    r"(?:essentially |completely )?(?:normal|unremarkable) (?:\w+[ -]){0,5}?"
    r"(?:study|exam|examination|mri|mr|ct|scan|brain|head|chest|radiograph)\b.*"
    r"|(?:(?:this|the) )?(?:\w+[ -]){0,4}?(?:study|exam|examination|mri|ct|scan) is (?:normal|unremarkable)"
    r"|no (?:significant |acute |detectable )?abnormalit(?:y|ies)(?: detected| seen| identified)?"
    r"|normal|unremarkable)\W*$",
    re.IGNORECASE,
)
_ADMINISTRATIVE = re.compile(
    r"^(?:"
    r"(?:this )?(?:report|study|exam|examination|case|images?) (?:was|were|has been) "
    r"(?:dictated|reviewed|interpreted|discussed|electronically)"
    r"|(?:electronically )?signed(?: by| electronically)|dictated by|transcribed by"
    r"|(?:these |the |critical )?(?:findings?|results?) (?:was|were|have been) "
    r"(?:discussed|communicated|conveyed|relayed|called|telephoned)"
    r"|i have (?:personally )?(?:reviewed|viewed)|attending (?:radiologist|physician)|end of report|thank you for"
    r"|as above\W*$|(?:please )?see (?:above|below|separate|the separate|body of)"
    r"|(?:dr|doctor)\.? [\w .]+ was (?:notified|informed|called)|comparison (?:is made|was made)"
    r"|compared? (?:to|with) (?:the )?(?:prior|previous)(?: \w+)* (?:of|from|dated) [\d/.\w ,-]+\.?$)",
    re.IGNORECASE,
)
_FILLER = re.compile(
    r"^(?:there (?:is|are|was|were)|again (?:seen|noted) (?:is|are)|(?:again )?noted (?:is|are)|"
    r"(?:a|an|the) (?:image|picture|photo|photograph) (?:of|shows)|in this (?:image|picture))\s+|"
    r"\s+(?:(?:is|are|was|were) )?(?:again )?(?:seen|noted|identified|demonstrated|present|visuali[sz]ed|evident)$"
)
_EVIDENCE = re.compile(
    r"\bno (?:(?:ct|mr|mri|radiographic|definite|convincing) )?(?:evidence|signs?) (?:of|for) (?:any )?"
)
_ARTICLES = re.compile(r"\b(?:a|an|the|any)\s+")
_SIDES = re.compile(r"\b(left|right|bilateral|bilaterally|both|anterior|posterior|upper|lower|superior|inferior|medial|"
                    r"lateral|links|rechts)\b", re.IGNORECASE)  # fmt: skip
_NUMBERS = re.compile(
    r"\d+(?:[.,]\d+)?|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|single|multiple|several|few|many)\b", re.I
)


@dataclass(frozen=True)
class ItemizeOptions:
    """How a report is cut into items."""

    sections: tuple[Literal["findings", "impression"], ...] = ("findings", "impression")
    """Sections whose sentences become items; a report without headings is taken whole."""

    language: str = "en"
    """Language of the sentence rules (a code that pysbd knows: en, de, fr, es, it, nl, zh, ja, …)."""

    split_semicolons: bool = True
    """Cut at semicolons too, where the part behind can stand alone."""

    keep_topics: bool = True
    """"Lungs: clear." stays whole; otherwise the label is dropped. Where the sentence names it anyway it goes."""

    drop_administrative: bool = True
    """Leave out who dictated, signed and called whom."""

    duplicates: Literal["keep", "exact", "normalised"] = "normalised"
    """Items that say the same as an earlier one: keep them, drop equal ones, or also those equal but for case,
    punctuation, articles and filler words."""

    semantic_threshold: float = 0.95
    """With a text encoder: cosine from which two items are one; never if numbers, sides or negation differ."""

    min_letters: int = 2
    """Shorter stretches are no items."""

    def __post_init__(self) -> None:
        threshold = self.semantic_threshold
        check(0 < threshold <= 1, f"--semantic-threshold is {threshold}; expected a cosine in (0, 1]")
        check(self.min_letters >= 1, f"--min-letters is {self.min_letters}; expected at least 1")
        check(bool(self.sections), "--sections names none; expected findings, impression or both")


@dataclass(frozen=True)
class LeftOut:
    """A stretch of a report that is no item, and why; `same_as` is the item that says it already."""

    text: str
    reason: Reason
    same_as: str = ""


@dataclass
class Itemized:
    """A report in items.

    Attributes:
        items: in the report's order.
        normal: no item reports a finding (`is_normal_report`).
        left_out: everything of the report that is in no item.
    """

    items: list[str]
    normal: bool
    left_out: list[LeftOut] = field(default_factory=list)


def itemize(
    report: str | Sequence[str], options: ItemizeOptions | None = None, *, similarity: Similarity | None = None
) -> Itemized:
    """The items of one report, or of several captions of one image.

    Args:
        report: the text, or texts about the same image, one after the other.
        options: what to cut and what to drop.
        similarity: a text encoder's cosines, for semantic duplicates.

    Raises:
        MissingExtraError: pysbd is not installed.
        UserError: a language that pysbd does not know.
    """
    options = options or ItemizeOptions()
    left_out: list[LeftOut] = []
    items: list[str] = []
    for text in [report] if isinstance(report, str) else report:
        for role, part in sections_of(text):
            if role == "other" or (role is not None and role not in options.sections):
                if part.strip():
                    left_out.append(LeftOut(_one_line(part), "section"))
                continue
            for element in list_elements(part):
                items += _items_of_element(element, options, left_out)
    kept = _without_duplicates(items, options, similarity, left_out)
    return Itemized(kept, is_normal_report(kept), left_out)


# --- sections and lists ----------------------------------------------------------------------------------------------


def sections_of(report: str) -> list[tuple[Role | None, str]]:
    """The sections of a report with their roles, headings taken away; what stands before the first has role None.

    Where there are headings, text before the first one is a title or an address: role "other".
    """
    text = report.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ").strip("\ufeff")
    found = sorted([*_HEADING_LINE.finditer(text), *_HEADING_INSIDE.finditer(text)], key=lambda match: match.start())
    # A heading found both ways counts once.
    headings = [match for n, match in enumerate(found) if n == 0 or match.start() >= found[n - 1].end()]
    if not headings:
        return [(None, text)]
    known = [_ROLE_OF[match[1].lower()] for match in headings]
    before = text[: headings[0].start()]
    # Only history or technique are named: the text before them is the report itself.
    first: Role | None = "other" if any(role != "other" for role in known) else None
    parts: list[tuple[Role | None, str]] = [(first, before)] if before.strip() else []
    for number, (match, role) in enumerate(zip(headings, known)):
        end = headings[number + 1].start() if number + 1 < len(headings) else len(text)
        parts.append((role, text[match.end() : end]))
    return parts


def section_role(name: str) -> Role | None:
    """What a heading's name stands for; None for a name that is no heading's."""
    return _ROLE_OF.get(name.strip().lower())


def list_elements(text: str) -> list[str]:
    """Elements of lists and paragraphs: markers are taken away, wrapped lines joined."""
    elements: list[str] = []
    open_element = False
    for line in text.split("\n"):
        if not line.strip():
            open_element = False
            continue
        marker = _BULLET.match(line)
        if marker:
            elements.append(line[marker.end() :].strip())
        elif open_element and not (elements[-1].endswith((".", ":", ";", "!", "?")) and line.lstrip()[:1].isupper()):
            elements[-1] += " " + line.strip()
        else:
            elements.append(line.strip())
        open_element = True
    return [part for element in elements for part in _inline_numbers(element)]


def _inline_numbers(text: str) -> list[str]:
    """ "1. Old infarct. 2. No mass." → its parts; numbers must run 1, 2, … so that "in segment 2. The" stays whole."""
    matches: list[re.Match[str]] = []
    for match in _INLINE_NUMBER.finditer(text):
        if int(match[1]) == len(matches) + 1:
            matches.append(match)
    if len(matches) < 2:
        return [text[matches[0].end() :] if matches and matches[0].start() == 0 else text]
    ends = [match.start() for match in matches[1:]] + [len(text)]
    parts = [text[: matches[0].start()], *(text[match.end() : end] for match, end in zip(matches, ends))]
    return [part.strip() for part in parts if part.strip()]


# --- sentences -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _segmenter(language: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its patterns predate Python's warnings about them
            import pysbd
    except ModuleNotFoundError as error:
        raise MissingExtraError("sentences need the package pysbd: pip install -e '.[reports]'") from error
    try:
        return pysbd.Segmenter(language=language, clean=False)
    except ValueError:
        raise UserError(
            f"--language is {language!r}; expected a code such as en, de, fr, es, it, nl, zh or ja"
        ) from None


def sentences_of(text: str, language: str = "en") -> list[str]:
    """Sentences of running text; together they are the text, white space between them apart.

    Raises:
        MissingExtraError, UserError: see `itemize`.
    """
    language = _script_language(text) or language
    segmenter = _segmenter(language)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = [part for part in segmenter.segment(text) if part.strip()]
    if re.sub(r"\s", "", "".join(parts)) != re.sub(r"\s", "", text):
        # A segmenter that adds or loses letters is not used: full stops before a capital separate.
        parts = re.split(r"(?<=[.!?。！？])\s+(?=[^\Wa-z\d_])", text)
    lower_cased = not re.search(r"[A-Z]", text)
    joined: list[str] = []
    for part in parts:
        start = part.lstrip()[:1]
        before = joined[-1] if joined else ""
        continues = _ENDS_SHORT.search(before) or (
            _ENDS_UNIT.search(before) and (start.islower() or start.isdigit()) and not lower_cased
        )
        if before and (continues or not re.search(r"\w", part)):
            joined[-1] = (
                f"{before.rstrip()} {part.lstrip()}" if re.search(r"\w", part) else before.rstrip() + part.strip()
            )
        else:
            joined.append(part)
    return [part.strip() for part in joined]


def _script_language(text: str) -> str | None:
    """zh or ja where the script says so: the rules of other languages do not know their full stops."""
    if re.search(r"[\u3040-\u30ff]", text):
        return "ja"
    return "zh" if re.search(r"[\u4e00-\u9fff]", text) else None


def _items_of_element(element: str, options: ItemizeOptions, left_out: list[LeftOut]) -> list[str]:
    items = []
    label, body = "", element
    topic = _TOPIC.match(element)
    # "NOTE: x" in capitals and "Lungs: x" are labels; "Ratio 3: 1" has a number and is none.
    if topic and len(topic[1].split()) <= 5:
        label, body = topic[1].strip(), element[topic.end() :]
    elif element.rstrip().endswith(":") and len(element.split()) <= 5:
        left_out.append(LeftOut(element, "heading"))
        return []
    for number, sentence in enumerate(sentences_of(body, options.language)):
        for part in split_semicolons(sentence) if options.split_semicolons else [sentence]:
            item = _one_line(part)
            if len(re.findall(r"[^\W\d_]", item)) < options.min_letters:
                left_out.append(LeftOut(item, "too short"))
            elif options.drop_administrative and _ADMINISTRATIVE.search(item):
                left_out.append(LeftOut(item, "administrative"))
            else:
                needs_label = label and options.keep_topics and (number == 0 or not _FINITE.search(item))
                items.append(f"{label}: {item}" if needs_label and not _names(item, label) else item)
    return items


def _names(item: str, label: str) -> bool:
    """Whether an item says what its label says."""
    stems = [word[:4] for word in re.findall(r"[^\W\d_]{3,}", label.lower()) if word not in ("and", "the", "other")]
    said = item.lower()
    return bool(stems) and any(stem in said for stem in stems)


def split_semicolons(sentence: str) -> list[str]:
    """Parts between semicolons that can stand alone; a part that leans on a negation before it stays with it."""
    parts = re.split(r"\s*;\s+", sentence)
    joined = [parts[0]]
    for part in parts[1:]:
        alone = len(part.split()) >= 2 and not re.match(r"(?:and|or|nor|which|und|oder)\b", part, re.IGNORECASE)
        if alone and is_negated(joined[-1]) and not _VERB.search(part):
            alone = False
        if alone:
            joined.append(part)
        else:
            joined[-1] += "; " + part
    return joined


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(" ;,")


# --- what items say --------------------------------------------------------------------------------------------------


def is_negated(item: str) -> bool:
    """Whether an item begins with a negation, such as "No evidence of"."""
    return bool(_NEGATED.search(item.strip()))


def is_normal_statement(item: str) -> bool:
    """Whether an item reports no finding: a plain negation, or something called normal, without a "but"."""
    text = item.strip()
    if _EXCEPTION.search(text):
        return False
    if is_negated(re.sub(_TOPIC, "", text)) or _WHOLE_NORMAL.match(text):
        return True
    return bool(_NORMAL.search(text)) and not _NEGATION_ANYWHERE.search(text)


def is_normal_report(items: Sequence[str]) -> bool:
    """Whether a report has items and none of them reports a finding."""
    return bool(items) and all(is_normal_statement(item) for item in items)


def comparable_text(item: str) -> str:
    """What two wordings of one item have in common: no case, accents kept, no punctuation, articles and filler words.

    Numbers keep their points, so 1.2 cm is not 12 cm; negations are kept.
    """
    text = unicodedata.normalize("NFKC", item).casefold().strip(" .;,:!")
    text = re.sub(r"(?<!\d)[.,](?!\d)|[^\w\s.,+/-]", " ", text)
    text = _EVIDENCE.sub("no ", " ".join(text.split()))
    for _ in range(2):
        text = _FILLER.sub("", text).strip()
    return " ".join(_ARTICLES.sub("", text + " ").split()).strip(" .,;") or text


def says_other_things(one: str, other: str) -> bool:
    """Whether numbers, sides or negation differ, which text encoders hardly see."""

    def facts(text: str) -> tuple[list[str], list[str], bool]:
        numbers, sides = _NUMBERS.findall(text), [side.lower() for side in _SIDES.findall(text)]
        return sorted(numbers), sorted(sides), bool(_NEGATION_ANYWHERE.search(text))

    return facts(one) != facts(other)


def _without_duplicates(
    items: list[str], options: ItemizeOptions, similarity: Similarity | None, left_out: list[LeftOut]
) -> list[str]:
    if options.duplicates == "keep":
        return items
    kept: dict[str, str] = {}
    for item in items:
        key = item if options.duplicates == "exact" else comparable_text(item)
        if key not in kept:
            kept[key] = item
        else:
            first = kept[key]
            left_out.append(LeftOut(item, "exact" if item == first else "normalised", first))
    texts = list(kept.values())
    if similarity is None or len(texts) < 2:
        return texts
    cosines_NN = np.asarray(similarity(texts))
    different: list[int] = []
    for row, text in enumerate(texts):
        same = [
            other
            for other in different
            if cosines_NN[row, other] >= options.semantic_threshold and not says_other_things(text, texts[other])
        ]
        if same:
            left_out.append(LeftOut(text, "semantic", texts[same[0]]))
        else:
            different.append(row)
    return [texts[row] for row in different]
