"""Rendering of comparisons for the terminal, Markdown, LaTeX and JSON, published rows, and the verb."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from compared import SEEDS, compared, own, recipe_of, science, written
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.commands.main import main
from lora_llava.evaluation.compare.compare_view import as_json, escape_latex, escape_markdown, render, write_p
from lora_llava.evaluation.published import PUBLISHED, published_table
from lora_llava.evaluation.scienceqa import COLUMNS, make_prediction

HOSTILE = r"a_b & 50% $x$ #1 \end{tabular} ~^ <b> | * [c] `d` -- {"


def test_the_terminal_s_table_at_100_columns(tmp_path: Path) -> None:
    recipes = {name: recipe_of(int(name[-1]), int(name[1:3])) for name in SEEDS}
    found = compared(tmp_path, {name: science(marks * 60) for name, marks in SEEDS.items()}, recipes)
    text = render(found, "terminal", published=True)
    assert max(map(len, text.splitlines())) <= 100
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "ScienceQA, 240 questions"
    for wanted in (
        "accuracy in % AVG NAT SOC LAN TXT IMG NO G1-6 G7-12",
        "r16 62.50 75.00 50.00 – 50.00 75.00 – 75.00 50.00",
        "(lora.r=16) ± 17.68 ± 35.36 ± 0.00 ± 0.00 ± 35.36 ± 35.36 ± 0.00",
        "LLaVA 13B 90.92 90.36 95.95 88.00 89.49 88.00 90.66 90.93 90.90",
        "LaVIN-lite 7B 88.35 – – – – – – – –",
        "against r16 seeds difference only first right only this right p p (Holm)",
        "r32 0 +50.00 0 120 < 0.0001 < 0.0001",
        "- mean ± sample standard deviation over seeds (r16: 0, 1; r32: 0, 1)",
    ):
        assert wanted in lines
    assert "the runs above answered 240 questions" in " ".join(lines)


def test_markdown_and_latex_of_two_runs(tmp_path: Path) -> None:
    found = compared(tmp_path, {"a_x": own("red cube", "x"), "b%": own("x", "x")})
    markdown = render(found, "markdown").splitlines()
    assert markdown[:6] == [
        "**Answers, 2 questions**",
        "",
        "| scores in % | exact match | F1 | ROUGE-L |",
        "| --- | ---: | ---: | ---: |",
        "| a_x | 50.00 (9.5–90.5) | 50.00 | 50.00 |",
        "| b% | 0.00 (0.0–65.8) | 0.00 | 0.00 |",
    ]
    assert markdown[9:12] == [
        "| against a_x | difference | only first right | only this right | p |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| b% | −50.00 | 1 | 0 | 1.0000 |",
    ]
    latex = render(found, "latex").splitlines()
    assert latex[2:11] == [
        "% Answers, 2 questions",
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"scores in \% & exact match & F1 & ROUGE-L \\",
        r"\midrule",
        r"a\_x & 50.00 (9.5--90.5) & 50.00 & 50.00 \\",
        r"b\% & 0.00 (0.0--65.8) & 0.00 & 0.00 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert r"b\% & $-$50.00 & 1 & 0 & 1.0000 \\" in latex


def unescaped(latex: str) -> str:
    """LaTeX without its commands: what is left of special characters would act."""
    return re.sub(r"\\[a-zA-Z]+\{\}|\\[&%$#_{}]|\$(\\pm|-)\$|\{[\[*]\}|-\{\}", "", latex)


@given(text=st.text(st.characters(codec="ascii"), max_size=30) | st.just(HOSTILE) | st.text(max_size=10))
def test_escaped_text_is_inert_in_latex_and_markdown(text: str) -> None:
    assert not set(unescaped(escape_latex(text))) & set("\\{}&%$#_^~<>|[*")
    assert "--" not in escape_latex(text.replace("–", ""))
    assert re.search(r"(?<!\\)(\\\\)*[|<`*\[]", escape_markdown(text)) is None


def test_hostile_names_leave_tables_balanced(tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "")
    recipes = {name: recipe_of(0, model=HOSTILE + "\n\x1b[2J\u202e"), "b": recipe_of(0, model="c")}
    found = compared(tmp_path, {name: science("rw"), "b": science("ww")}, recipes)
    latex = render(found, "latex", published=True)
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2
    for block in re.findall(r"\\begin\{tabular\}\{(l+r+)\}(.*?)\\end\{tabular\}", latex, re.DOTALL):
        columns, rows = block
        for row in rows.split(r" \\" + "\n")[:-1]:
            assert len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1
    commands = re.findall(r"\\(?:toprule|midrule|bottomrule|(?:begin|end)\{tabular\}(?:\{l+r+\})?) *", latex)
    bare = unescaped(re.sub(r"(?m)^%.*$| \\\\$", "", latex))
    for command in commands:
        bare = bare.replace(command.strip(), "", 1)
    assert not set(bare) & set("\\{}%$#_^~<>|[*")
    markdown = render(found, "markdown")
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {11, 6}
    for text in (latex, markdown, render(found, "terminal")):
        assert not {c for c in text if ord(c) < 32 or c == "\u202e"} - {"\n"}


def test_p_values_are_formatted() -> None:
    assert [write_p(p) for p in (0.00009, 0.0001, 0.04567, 1.0)] == ["< 0.0001", "0.0001", "0.0457", "1.0000"]


def test_json_has_everything_unrounded(tmp_path: Path) -> None:
    recipes = {name: recipe_of(int(name[-1]), int(name[1:3])) for name in SEEDS}
    found = json.loads(as_json(compared(tmp_path, {n: science(m) for n, m in SEEDS.items()}, recipes), published=True))
    assert found["groups"][0]["columns"]["AVG"] == {
        "mean": 62.5,
        "deviation": statistics.stdev([50, 75]),
        "values": [50.0, 75.0],
    }
    assert found["groups"][0]["columns"]["LAN"] == {"mean": None, "deviation": None, "values": [None, None]}
    assert [run["seed"] for run in found["groups"][0]["runs"]] == [0, 1]
    assert found["tests"][0] == {
        "first": "r16",
        "other": "r32",
        "seeds": [0, 0],
        "questions": 4,
        "only_first": 0,
        "only_other": 2,
        "p": 0.5,
        "holm": 1.0,
        "difference": 50.0,
    }
    assert found["published"]["LLaVA 13B"]["columns"]["AVG"] == 90.92


def test_published_averages_are_those_of_their_columns() -> None:
    """The test split has 2,252 questions of NAT, 889 of SOC and 1,100 of LAN."""
    assert published_table().row_count == len(PUBLISHED) == 9
    for name, row in PUBLISHED.items():
        columns = row["columns"]
        assert list(columns) == list(COLUMNS[: len(columns)])
        assert "github.com" in row["source"] or "leaderboard" in row["source"]
        if len(columns) == len(COLUMNS):
            mean = (2252 * columns["NAT"] + 889 * columns["SOC"] + 1100 * columns["LAN"]) / 4241
            assert abs(mean - columns["AVG"]) < 0.02, name


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str], stage2_content: dict[str, Any]) -> None:
    scored = [
        make_prediction(
            str(n),
            text,
            {
                "answer": 0,
                "num_choices": 2,
                "subject": "natural science",
                "grade": "grade1",
                "has_image": True,
                "has_hint": False,
            },
        )
        for n, text in enumerate(("A", "B", "?"))
    ]
    runs = []
    for seed in (1, 2):
        run = written(tmp_path / f"run-{seed}", scored, name="predictions_after")
        (run / "recipe.yaml").write_text(json.dumps({**stage2_content, "seed": seed, "output_dir": str(run)}))
        runs.append(str(run))
    assert main(None, ["compare", *runs]) == 0
    out = capsys.readouterr().out
    assert "± 0.00" in out
    assert "run: 1, 2" in out
    assert main(None, ["compare", *runs, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"][0]["columns"]["AVG"]["mean"] == pytest.approx(100 / 3)
    file = tmp_path / "table.tex"
    assert main(None, ["compare", *runs, "--format", "latex", "--published", "--output", str(file)]) == 0
    assert capsys.readouterr().out == f"written to {file}\n"
    assert r"LLaVA 13B & 90.92" in file.read_text()
    (tmp_path / "own.jsonl").write_text(json.dumps(own("x")[0]))
    assert main(None, ["compare", str(tmp_path / "own.jsonl"), "--published"]) == 2
    assert capsys.readouterr().err.startswith("error: --published: the published rows are for ScienceQA")
