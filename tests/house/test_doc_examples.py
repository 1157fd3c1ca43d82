"""Every code block and command of README and docs is run, or says why not; the site builds with no broken link."""

import logging
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from evl_cache_cli.main import main
from tests.support.doc_blocks import RUN, Block, blocks, commands, objections
from tests.support.example_data import DEMO_TOWER, ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What makes the published commands short on small clips: a page never says it.
SMALL = {
    "EVL_CACHE_EXTRACT_STRIDE": "1",
    "EVL_CACHE_EXTRACT_DECODE_WORKERS": "1",
    "EVL_CACHE_TRAIN_EPOCHS": "2",
    "EVL_CACHE_SWEEP_EPOCHS": "2",
}


@pytest.fixture
def sandbox(work, monkeypatch) -> Path:
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    torch.set_num_threads(1)
    return work


def run_shell(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """evl-cache in this process, `export` and `cd` too; whatever else by the shell."""
    for line, words in commands(text):
        if words[0] == "export":
            for setting in words[1:]:
                monkeypatch.setenv(*setting.split("=", 1))
        elif words[0] == "cd":
            monkeypatch.chdir(words[1])
        elif words[0] == "evl-cache":
            assert run_ours(words[1:], monkeypatch) == 0, line
        else:
            done = subprocess.run(
                ["bash", "-ec", line], capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def run_ours(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    if any(word in ("7-12", "8-12", "9-12") for word in words):  # a tower with so many blocks
        os.environ[f"EVL_CACHE_{words[0].upper()}_MODEL"] = "deep-tower.json"
    if "--online" in words:
        os.environ |= {"EVL_CACHE_TRAIN_MODEL": str(DEMO_TOWER), "EVL_CACHE_TRAIN_PRETRAINED": "none"}
    if words[0] == "train" and "--recipe" in words:  # whose length is in steps
        del os.environ["EVL_CACHE_TRAIN_EPOCHS"]
        os.environ["EVL_CACHE_TRAIN_STEPS"] = "4"
    try:
        main(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        signal.signal(signal.SIGTERM, handler)
        os.environ.clear()
        os.environ.update(environment)
    raise AssertionError("main does not return")


def is_run(block: Block) -> bool:
    return block.language in (*RUN, "setup") and block.why_not is None and block.tested_by is None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_are_run_or_say_why_not(page):
    assert objections(page, ROOT) == []


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(map(is_run, blocks(p)))], ids=lambda page: page.stem
)
def test_a_page_read_from_top_to_bottom_works(page, sandbox, monkeypatch):
    names: dict[str, object] = {"__name__": page.stem}
    for block in filter(is_run, blocks(page)):
        if block.language == "python":
            code = "\n" * block.line + block.text  # a traceback then names the line of the page
            exec(compile(code, str(page), "exec"), names)
        else:
            run_shell(block.text, monkeypatch)


def test_the_site_builds_and_has_no_broken_link(tmp_path, monkeypatch):
    pytest.importorskip("material", reason="needs the extra docs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    problems: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            problems.append(record.getMessage())

    handler = Keep(level=logging.WARNING)
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=False))
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    assert problems == []
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "fonts.googleapis" not in home  # readable where there is no network
    for link in ("quickstart", "commands", "architecture"):
        assert (tmp_path / "site" / link / "index.html").is_file()


def test_links_of_the_readme_lead_somewhere():
    import re

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    local = [target for target in targets if "://" not in target]
    assert len(local) >= 5
    assert [target for target in local if not (ROOT / target).exists()] == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```\nx\n```", "language ''"),
        ("```text\nevl-cache info x\n```", "commands in a block of text"),
        ("<!-- not run: slow -->\n```bash\nx\n```", "is no reason"),
        ("<!-- tested by tests/house/test_docs.py -->\n```python\nx\n```", "does not read this page"),
    ],
)
def test_a_block_that_breaks_the_rules_is_found(tmp_path, text, problem):
    (tmp_path / "page-of-a-test.md").write_text(text + "\n")
    (found,) = objections(tmp_path / "page-of-a-test.md", ROOT)
    assert problem in found and found.startswith("page-of-a-test.md:")


def test_lines_are_joined_and_comments_left_out():
    text = "evl-cache extract --root 'a b' \\\n  --layers 1-2   # why\n# nothing\n\nexport A=1"
    assert [words for _, words in commands(text)] == [
        ["evl-cache", "extract", "--root", "a b", "--layers", "1-2"],
        ["export", "A=1"],
    ]


def test_every_message_of_the_troubleshooting_page_is_one_of_ours():
    import re

    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    code = "".join(
        p.read_text(encoding="utf-8") for top in ("evl_cache", "cli") for p in (ROOT / top).rglob("*.py")
    )
    assert len(messages) > 15
    assert [message for message in messages if message not in code] == []
