"""benchmarks/paper_tables.py: its formulas are what torch counts, and its page has every row of the paper's tables."""

from __future__ import annotations

import dataclasses
import re

import paper_tables
import paper_values
import pytest
from support.paths import ROOT

PAGE = ROOT / "docs" / "paper_tables.md"


def sections(text):
    return re.split(r"^## ", text, flags=re.MULTILINE)


def table(number):
    """Returns the cells of a table of the page, without its headings."""
    section = sections(PAGE.read_text(encoding="utf-8"))[number]
    assert section.startswith(f"Table {number}")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ]
    return rows[2:]


@pytest.mark.parametrize("sizes", paper_tables.SIZES, ids=str)
def test_torch_counts_what_the_formulas_of_table_1_give(sizes):
    formulas = paper_tables.table_1(*sizes)
    assert [each.name for each in formulas] == ["Conv", "DwConv", "DyFilter", "DDF"]
    for each in formulas:
        each.check()
        params, macs, filters = each.expected
        with pytest.raises(RuntimeError, match=f"table 1, {each.name}"):
            dataclasses.replace(each, expected=(params, macs + 1, filters)).check()


def test_the_page_has_every_row():
    formulas = paper_tables.table_1(*paper_tables.SIZES[-1])
    assert [row[0] for row in table(1)] == [each.name for each in formulas]
    assert [row[4] for row in table(1)] == [f"{each.counted[1]:,}" for each in formulas]
    assert [row[0] for row in table(2)] == [f"{size}x{size}" for size in paper_values.TABLE_2]
    quoted = [[cell.split(" / ")[0] for cell in row[2:6]] for row in table(2)]
    assert quoted == [[f"{value:.2f}" for value in row] for row in paper_values.TABLE_2.values()]
    assert [row[0] for row in table(3)] == [row.name for row in paper_values.TABLE_3]
    for number, rows in ((4, paper_values.TABLE_4), (5, paper_values.TABLE_5)):
        expected = [(row.name, row.params or "-", row.macs or "-", row.top1 or "-") for row in rows]
        shown = [(row[1], row[2].removesuffix(" M"), row[4].removesuffix(" G"), row[6]) for row in table(number)]
        assert shown == expected
        assert [row[3] == "-" for row in table(number)] == [row.build is None for row in rows]  # quoted alone


@pytest.mark.long
def test_the_page_is_what_the_script_writes_but_for_times():
    row = {column: {"forward_ms": 1.0} for column in paper_tables.COLUMNS}
    sizes = {str(size): row for size in paper_values.TABLE_2}
    machine = {"device": "cpu", "processor": "some processor", "threads": 1, "torch": "2.0"}
    latency = {"machine": machine, "batches": dict.fromkeys(sizes, 1), "results": {"contiguous": sizes}}
    written = sections("\n".join([*paper_tables.page(latency), ""]))
    stored = sections(PAGE.read_text(encoding="utf-8"))
    for number in (1, 3, 4, 5):
        assert written[number] == stored[number]
