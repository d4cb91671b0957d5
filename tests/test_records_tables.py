"""Tables: how they are laid out."""

from d2sparse import records


def test_a_markdown_table_is_aligned_and_leaves_absent_cells_empty():
    rows = [
        {"method": "D2-Sparse", "accuracy": "91.2 ± 0.3", "unused": 1},
        {"method": "dense", "macs": 1.0},
    ]
    columns = {"method": "method", "accuracy": "accuracy (%)", "macs": "MACs"}
    table = records.markdown_table(rows, columns).splitlines()
    assert len({len(line) for line in table}) == 1
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert cells[0] == ["method", "accuracy (%)", "MACs"]
    assert [cell.strip("-") for cell in cells[1]] == [":", ":", ":"]
    assert [cell.endswith(":") for cell in cells[1]] == [False, True, True]
    assert cells[2:] == [["D2-Sparse", "91.2 ± 0.3", ""], ["dense", "", "1.0"]]


def test_numbers_in_cells_are_left_as_they_are():
    table = records.markdown_table([{"a": "x", "b": "0.50"}], {"a": "a", "b": "b"})
    assert "0.50" in table
