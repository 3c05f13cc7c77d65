"""What a reader finds in evaluation_report.md."""

import math
import re

from flare.evaluation.report.comparison_rows import ComparisonRow, comparison_row
from flare.evaluation.report.figures import Plot
from flare.evaluation.results import add_failure
from tests.evaluation.example_results import STAGE2, example_results, four_rows, report, row


def test_first_three_lines_are_title_verdict_and_main_result(tmp_path):
    lines = report(tmp_path, example_results(), rows=four_rows(), label="stage 2").splitlines()
    assert lines[0] == "# Evaluation of my run/final_model (qwen2_nope, NoPE layers: 4-6) on embedded"
    assert lines[1].startswith("**Verdict:** Recovered: stage 2 is 3.0 % above base")
    assert lines[2] == "**Main result:** perplexity 7.61 on embedded, +3.0 % vs. base."


def test_main_result_is_of_the_evaluated_model(tmp_path):
    rows = [*four_rows(), row("control", "control", 1.9)]
    text = report(tmp_path, example_results(), rows=rows, label="stage 2")
    assert text.splitlines()[2].endswith("perplexity 7.61 on embedded, +3.0 % vs. base, +13.9 % vs. control.")
    assert "- control: training with RoPE kept" in text
    assert "Further training changes the loss by itself" not in text  # the control is there


def test_tables_contain_the_numbers_and_have_equal_columns(tmp_path):
    text = report(tmp_path, example_results(), rows=four_rows())
    assert "| patched | 3.0000 | 20.09 | 1.5000 | +171.8 % | – |" in text
    assert "| base | 2.0000 | 7.39 | 1.0000 | – | – |" in text
    assert "| embedded | 7.61 | 2.0300 | 0.8123 | – | 1.7561 | 43.21 % | 12 | 3,456 | 0 |" in text
    assert "| peak memory | 1.00 GiB |" in text
    for table in re.findall(r"(?:^\|.*\n?)+", text, flags=re.M):
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1
    for setting in ("protocol | document", "max length | 128", "prefix token id | 0", "tokenizer SHA-256 | t1"):
        assert f"| {setting} |" in text


def test_different_tokenizer_is_marked_and_compared_in_bits_per_byte(tmp_path):
    rows = [row("base", "base", 2.0, bits=1.0), row("other", "trained", 1.0, tokenizer="t2", bits=1.1)]
    text = report(tmp_path, example_results(), rows=rows, label="other")
    assert "| other | 1.0000 \\* | 2.72 \\* | 1.1000 | +10.0 % \\* | – |" in text
    assert "not comparable between tokenizers" in text
    assert text.splitlines()[2] == "**Main result:** 0.8123 bits per byte on embedded, +10.0 % vs. base."
    assert "not comparable between tokenizers" not in report(tmp_path, example_results(), rows=four_rows())


def test_plots_have_relative_links_and_a_caption(tmp_path):
    plots = [Plot(tmp_path / "plots" / "loss by position.png", "plots/x", "Lower is better.")]
    assert "(plots/loss%20by%20position.png)\n\nLower is better." in report(tmp_path, example_results(), plots)


def test_failed_data_sets_are_listed_with_their_error(tmp_path):
    results = example_results()
    add_failure(results, "a|b", "two\nlines <html>")
    text = report(tmp_path, results)
    assert "- a\\|b: two lines &lt;html>" in text
    assert "1 of 2 data sets could not be scored" in text
    results["datasets"].pop("embedded")
    assert report(tmp_path, results).splitlines()[2] == "**Main result:** none."


def test_notes_depend_on_the_layout_of_the_nope_layers(tmp_path):
    band, interleaved, plain = (report(tmp_path, example_results(layers)) for layers in ((4, 5, 6), (3, 7, 11), ()))
    assert "hardly extrapolate beyond" in band and "every:4" in band
    assert "are interleaved, the layout that extrapolates best" in interleaved
    assert "## Notes" not in plain
    assert "--no_rope_layers none" in report(tmp_path, example_results(()), rows=four_rows())
    both = example_results(())
    for name in ("wikitext-2", "wikitext-103"):
        both["datasets"][name] = both["datasets"]["embedded"]
    assert "share their test set" in report(tmp_path, both)


def test_comparison_row_of_a_results_file():
    made = comparison_row("stage 2", "trained", example_results(), "embedded")
    assert made == ComparisonRow("stage 2", "trained", "embedded", STAGE2, math.exp(STAGE2), 0.8123, "t1")
