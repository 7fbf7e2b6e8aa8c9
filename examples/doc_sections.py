"""The sections of Python's own documentation, for search: what ``help("for")`` prints, cut at the
headings. CPython carries the text in every installation, as ``pydoc_data.topics``.
"""

from dataclasses import dataclass
from pydoc_data.topics import topics as TOPICS

# Sphinx underlines a heading over its whole width with one of these.
UNDERLINES = "*=-~^"


@dataclass(frozen=True)
class Section:
    """Part of a topic: from one heading to the next.

    Attributes:
        topic: what help() calls the topic.
        heading: of the section, or of the topic where the section has none.
        text: heading and text.
    """

    topic: str
    heading: str
    text: str


def sections() -> list[Section]:
    """Returns all sections, in alphabetical order of topics.

    A section that is in several topics comes once, under the shortest of them: "compound" holds all
    of "for".
    """
    found: dict[str, Section] = {}
    for topic in sorted(TOPICS, key=lambda topic: (len(TOPICS[topic]), topic)):
        for section in cut(topic, TOPICS[topic]):
            found.setdefault(section.text, section)
    return sorted(found.values(), key=lambda section: section.topic)


def cut(topic: str, text: str) -> list[Section]:
    """Cuts a topic at its headings; sections without any text are left out."""
    lines = text.strip("\n").split("\n")
    heading, body, found = topic, [], []

    def finish():
        content = "\n".join(body).strip()
        if content:
            found.append(Section(topic, heading, f"{heading}\n\n{content}"))

    i = 0
    while i < len(lines):
        if i + 1 < len(lines) and is_underline(lines[i + 1], of=lines[i]):
            finish()
            heading, body = lines[i].strip(), []
            i += 2
        else:
            body.append(lines[i])
            i += 1
    finish()
    return found


def is_underline(line: str, of: str) -> bool:
    """Says whether `line` underlines the heading `of`."""
    return (
        len(line) == len(of) >= 3
        and line[0] in UNDERLINES
        and set(line) == {line[0]}
        and not set(of) <= set(UNDERLINES)
    )
