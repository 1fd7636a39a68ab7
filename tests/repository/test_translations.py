"""Translations and help pages: complete, nothing stale, and the same facts in each language."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LOCALES = ROOT / "locales"
DOCS = ROOT / "js" / "docs"
TRANSLATIONS = ("zh", "ja", "fr")


def read(language, name):
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


# A test of the live server compares the English one with the nodes.
ENGLISH = read("en", "nodeDefs")
NODES = {language: read(language, "nodeDefs") for language in TRANSLATIONS}


def help_page(node_id, language=None):
    path = DOCS / f"{node_id}.md" if language is None else DOCS / node_id / f"{language}.md"
    return path.read_text(encoding="utf-8")


def leaves(tree, path=()):
    for key, value in tree.items():
        yield from leaves(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]


def has_the_facts(text, english):
    """Whether the two have the same numbers and names; a language may write as a digit what English has a word for."""
    return literals(text) >= literals(english) and not literals(text) - literals(english) - set("1234")


def literals(text):
    """What no translation changes: numbers, and names with a digit or an underscore in them."""
    text = re.sub(r"(?<=\d),(?=\d)", ".", text)
    return {word.strip("*./-") for word in re.findall(r"[\w.*/-]*[\d_][\w.*/-]*", text, re.ASCII)}


def code_spans(text):
    return set(re.findall(r"`([^`]+)`", text))


def input_rows(page):
    """First cells of the table of inputs, which is the one that names ``model`` or ``folder`` first."""
    table = re.search(r"^\|[^\n]*\|\n\|[-|]+\|\n(\| [^|\n]*`(?:model|folder)`[^|\n]* \|(?:[^\n]+\n)+)", page, re.M)
    return [row.split(" | ")[0].removeprefix("| ") for row in table[1].splitlines()]


def test_each_language_has_the_same_files():
    assert {path.name for path in LOCALES.iterdir()} == {"en", *TRANSLATIONS}
    assert [path.name for path in (LOCALES / "en").iterdir()] == ["nodeDefs.json"]
    for language in TRANSLATIONS:
        files = {"main.json", "nodeDefs.json", "settings.json"}
        assert {path.name for path in (LOCALES / language).iterdir()} == files
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert pages == {f"{node}{page}.md" for node in ENGLISH for page in ("", *(f"/{each}" for each in TRANSLATIONS))}


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_each_text_of_a_node_is_translated(language):
    english, translated = dict(leaves(ENGLISH)), dict(leaves(NODES[language]))
    assert list(translated) == list(english)
    for path, text in translated.items():
        assert text.strip(), path
        # Only a word that is the same in both languages, such as a name of torch.compile, may stay.
        assert path[-1] == "name" or text != english[path], path
        assert path[-1] == "name" or has_the_facts(text, english[path]), path
        # The page's translation library would read these as its own syntax.
        assert not re.search(r"[{}|@]", text), path


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_the_settings_are_translated(language):
    script = (ROOT / "js" / "hotpath.js").read_text(encoding="utf-8")
    ids = re.findall(r'"(HotPath\.\w+)"', script)
    settings = read(language, "settings")
    assert set(settings) == {each.replace(".", "_") for each in ids}
    assert all(set(texts) == {"name", "tooltip"} and all(texts.values()) for texts in settings.values())
    categories = set(re.findall(r'category: \["HotPath", "(\w+)"', script))
    assert set(read(language, "main")["settingsCategories"]) == categories


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_what_the_canvas_says_is_translated(language):
    script = (ROOT / "js" / "texts.js").read_text(encoding="utf-8")
    english = dict(re.findall(r'^  (\w+): "(.*)",$', script, re.MULTILINE))
    report = (ROOT / "host" / "telling" / "report.py").read_text(encoding="utf-8")
    meanings = next(
        node.value
        for node in ast.parse(report).body
        if isinstance(node, ast.Assign) and [target.id for target in node.targets] == ["_TERMS"]
    )
    said = {term: text for term, (_, text) in ast.literal_eval(meanings).items()}
    texts = dict(read(language, "main")["HotPath"])
    terms = texts.pop("terms")
    assert set(texts) == set(english) and set(terms) == set(said)
    for key, text in {**texts, **terms}.items():
        # A gain is one in French, too.
        assert text.strip() and (key == "gain" or text != english.get(key)), key
        assert text.count("...") == english.get(key, "").count("..."), key
    keys = set(re.findall(r'\btext\("(\w+)"', (ROOT / "js" / "hotpath.js").read_text(encoding="utf-8")))
    assert keys <= set(english), "a key without a text"


@pytest.mark.parametrize("node_id", ENGLISH)
def test_the_help_page_explains_each_input(node_id):
    page = help_page(node_id)
    assert page.startswith(f"# {ENGLISH[node_id]['display_name']}\n")
    explained = [name for row in input_rows(page) for name in re.findall(r"`(\w+)`", row)]
    assert explained == list(ENGLISH[node_id]["inputs"])
    outputs = [output["name"] for output in ENGLISH[node_id]["outputs"].values() if "name" in output]
    assert code_spans(page) >= set(outputs)
    assert re.search(r"^    .*" + re.escape(ENGLISH[node_id]["display_name"]), page, re.M), "it has no example"
    assert "\n| What you see | What it means |\n" in page


@pytest.mark.parametrize("language", TRANSLATIONS)
@pytest.mark.parametrize("node_id", ENGLISH)
def test_the_translated_help_page_says_the_same(node_id, language):
    english, page = help_page(node_id), help_page(node_id, language)
    names = NODES[language]
    assert page.startswith(f"# {names[node_id]['display_name']}\n")
    assert code_spans(page) == code_spans(english)
    assert has_the_facts(page, english)
    assert re.sub(r"[^|\n]", "", tables(page)) == re.sub(r"[^|\n]", "", tables(english))
    assert len(re.findall(r"^    \S", page, re.M)) == len(re.findall(r"^    \S", english, re.M))
    assert named(page, names) == named(english, ENGLISH)
    labels = [
        f"`{name}`" if texts["name"] == name else f"{texts['name']} (`{name}`)"
        for name, texts in names[node_id]["inputs"].items()
    ]
    assert [label for row in input_rows(page) for label in re.split("[,\u3001] ?", row.removesuffix(" |"))] == labels


def tables(page):
    return "\n".join(line for line in page.splitlines() if line.startswith("|"))


def named(page, names):
    """Our nodes that a page names, with line breaks and code that quotes English messages left aside."""
    text = re.sub(r"`[^`]+`", "", " ".join(page.split()))
    return {node_id for node_id, texts in names.items() if texts["display_name"] in text}


def messages():
    """The constant parts of each text of the pack that Python makes."""
    for folder in ("host", "hotpath", "nodes"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield [part.value for part in node.values if isinstance(part, ast.Constant)]
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield [node.value]


@pytest.mark.parametrize("page", [*(DOCS / f"{node}.md" for node in ENGLISH), ROOT / "docs" / "troubleshooting.md"])
def test_messages_that_a_page_explains_are_those_of_the_code(page):
    said = list(messages())
    tables = re.findall(
        r"^\| What you see \| What it means \|\n\|---\|---\|\n((?:\|.*\n)+)", page.read_text(encoding="utf-8"), re.M
    )
    for row in "".join(tables).splitlines():
        for message in code_spans(row.split(" | ")[0]):
            for part in filter(None, map(str.strip, message.split("..."))):
                assert any(is_said(part, parts) for parts in said), part


def is_said(text, parts):
    """Whether a message with these parts says it, be it only around what is filled in."""
    bare = [part.strip(" ().") for part in parts]
    return any(text in part or (len(part) > 8 and part in text) for part in bare)


def test_each_node_that_tells_what_it_does_has_a_panel_that_knows_its_states():
    script = (ROOT / "js" / "hotpath.js").read_text(encoding="utf-8")
    with_panel = re.compile(re.search(r"^const WITH_PANEL = /(.*)/;$", script, re.MULTILINE)[1])
    for path in (ROOT / "nodes").glob("*.py"):
        node = path.read_text(encoding="utf-8")
        if found := re.search(r'node_id="(\w+)"', node):
            tells, has_panel = "NodeText(" in node, bool(with_panel.match(found[1]))
            # What ends in a text of its own shows that.
            assert tells == has_panel or (tells and "ui=" in node), found[1]
    signs = re.search(r"^const SIGNS = \{\n(.*?)^\};$", script, re.MULTILINE | re.DOTALL)[1]
    states = set(re.findall(r"^  (\w+):", signs, re.MULTILINE)) - {"idle"}
    progress = (ROOT / "host" / "telling" / "progress.py").read_text(encoding="utf-8")
    assert states == set(re.findall(r"``(\w+)``", re.search(r"state: (.*?)\n +reasons:", progress, re.DOTALL)[1]))
