"""Items from a language model behind an OpenAI-compatible endpoint; used only where a user gives its URL.

What it answers is not believed: the answer must have the schema asked for, and an item whose words, numbers, sides or
negation are not those of its report is left out as "unsupported". Answers are kept on disk by the SHA-256 of everything
that was asked, so that a stopped run goes on and a repeated one costs nothing.

The protocol is POST {url}/chat/completions (https://platform.openai.com/docs/api-reference/chat), which vLLM,
llama.cpp, Ollama and others speak.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from itemizedclip.data.itemize import Itemized, LeftOut, comparable_text, is_negated, is_normal_report, sentences_of
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import parse_json, read_json, write_json

PROMPT = (
    "Split the report into independent items, one finding or fact each, in the report's own words and language. Keep "
    "negations, sides, sizes and numbers with what they belong to. Leave out headings, history, technique, comparison "
    "dates, names and signatures. Say nothing twice, add nothing. Answer with JSON: "
    '{"items": ["…", …]}.'
)
"""What the model is asked; part of the key of kept answers."""

SCHEMA = {
    "type": "object",
    "properties": {"items": {"type": "array", "items": {"type": "string"}}},
    "required": ["items"],
    "additionalProperties": False,
}

MIN_WORDS_SHARED = 0.75
"""Share of an item's words that its report must hold."""


class EndpointError(UserError):
    """An endpoint that cannot be reached, refuses, or answers something else than asked."""


@dataclass
class EndpointUse:
    """What an endpoint was used for and what it cost.

    Attributes:
        requests: answered by the endpoint.
        from_cache: answered by an earlier run.
        prompt_tokens: as the endpoint counts them.
        completion_tokens: the same of its answers.
        failures: key → why the report was cut by rules instead.
        unsupported: items left out because their report does not hold them.
    """

    requests: int = 0
    from_cache: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    unsupported: int = 0


@dataclass
class ItemEndpoint:
    """A language model that cuts reports.

    Attributes:
        url: base of the API, such as http://127.0.0.1:8000/v1.
        model: name of the model there.
        cache: folder of kept answers.
        api_key: sent as bearer token when it is not empty.
        timeout_s: seconds for one answer.
        attempts: of each report, a second apart and then two, four …
        use: what was done so far.
    """

    url: str
    model: str
    cache: Path
    api_key: str = ""
    timeout_s: float = 120.0
    attempts: int = 3
    use: EndpointUse = field(default_factory=EndpointUse)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--endpoint is {self.url!r}; expected a URL such as http://127.0.0.1:8000/v1")

    @property
    def is_local(self) -> bool:
        """Whether texts stay on this machine."""
        return urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")

    def itemize(self, texts: Sequence[str]) -> Itemized:
        """The items of one report.

        Raises:
            EndpointError: no answer, or none with the schema.
        """
        report = "\n\n".join(texts)
        items: list[str] = []
        left_out: list[LeftOut] = []
        seen: dict[str, str] = {}
        for item in self._answer(report):
            key = comparable_text(item)
            if not is_supported(item, report):
                left_out.append(LeftOut(item, "unsupported"))
                self.use.unsupported += 1
            elif key in seen:
                left_out.append(LeftOut(item, "exact" if item == seen[key] else "normalised", seen[key]))
            else:
                seen[key] = item
                items.append(item)
        return Itemized(items, is_normal_report(items), left_out)

    def _answer(self, report: str) -> list[str]:
        body = {
            "model": self.model,
            "temperature": 0,
            "messages": [{"role": "system", "content": PROMPT}, {"role": "user", "content": report}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "items", "schema": SCHEMA, "strict": True},
            },
        }
        asked = hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()
        kept = self.cache / f"{asked}.json"
        if kept.is_file():
            self.use.from_cache += 1
            return checked_items(read_json(kept, holding="a kept answer"), str(kept))
        answer = self._post(body)
        usage = answer.get("usage") or {}
        self.use.requests += 1
        for name in ("prompt_tokens", "completion_tokens"):
            count = usage.get(name)
            setattr(self.use, name, getattr(self.use, name) + (count if isinstance(count, int) else 0))
        try:
            content = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise EndpointError(f"{self.url}: answered without choices[0].message.content") from None
        if not isinstance(content, str):
            raise EndpointError(f"{self.url}: answered no text")
        value = parse_json(content, source=f"answer of {self.url}", holding='{"items": ["…", …]}')
        items = checked_items(value, f"answer of {self.url}")
        write_json(kept, {"items": items})
        return items

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)  # noqa: S310  http(s) only
        why = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:  # noqa: S310  the same
                    answer = parse_json(response.read().decode(), source=address, holding="a chat completion")
                if isinstance(answer, dict):
                    return answer
                why = "answered no object"
            except urllib.error.HTTPError as error:
                why = f"answered {error.code} {error.reason}"
                if error.code < 500 and error.code != 429:  # asking again does not help
                    break
            except (OSError, UnicodeDecodeError) as error:
                why = str(getattr(error, "reason", error)) or type(error).__name__
        raise EndpointError(f"{address}: {why}")


def checked_items(value: object, source: str) -> list[str]:
    """The items of an answer that has the schema.

    Raises:
        EndpointError: it has not.
    """
    if not isinstance(value, dict) or set(value) != {"items"} or not isinstance(value["items"], list):
        raise EndpointError(f'{source}: expected {{"items": ["…", …]}}')
    if not all(isinstance(item, str) for item in value["items"]):
        raise EndpointError(f"{source}: expected items that are texts")
    return [" ".join(item.split()) for item in value["items"] if item.strip()]


def is_supported(item: str, report: str) -> bool:
    """Whether a report says what an item says, as far as words tell.

    At least `MIN_WORDS_SHARED` of its words, and every number and side, must stand in one sentence of the report or in
    two that follow each other; and where that sentence negates, so must the item, and the reverse.
    """
    said = [sentence for line in report.splitlines() if line.strip() for sentence in sentences_of(line)]
    windows = [(one, _negates(one)) for one in said]
    windows += [(f"{one} {two}", negates) for (one, negates), (two, also) in pairwise(windows) if negates == also]
    wanted = _stems(item)
    exact = set(re.findall(r"\d+(?:[.,]\d+)?", item)) | (wanted & {"left", "righ", "bila"})
    for window, negates in windows:
        has = _stems(window)
        shared = len(wanted & has) >= MIN_WORDS_SHARED * len(wanted)
        same_numbers = exact <= (has | set(re.findall(r"\d+(?:[.,]\d+)?", window)))
        if wanted and shared and same_numbers and negates == _negates(item):
            return True
    return False


def _negates(text: str) -> bool:
    return is_negated(text) or bool(re.search(r"\b(?:no|not|without|negative)\b", text, re.IGNORECASE))


def _stems(text: str) -> set[str]:
    """Beginnings of words of three letters or more: "lesions" and "lesion" are one."""
    return {word[:4] for word in re.findall(r"[^\W\d_]{3,}", text.lower()) if word not in ("the", "and", "with", "are")}
