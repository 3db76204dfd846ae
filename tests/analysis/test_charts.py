"""Charts as elements of a page."""

from xml.etree import ElementTree

from atss.analysis.charts import INK, line_chart


def test_chart_is_one_element_in_the_ink_of_the_page():
    chart = line_chart(
        {"a": ([0, 1], [0, 2]), "b": ([0, 1], [1, 1])}, "x", "y", points={"a": (1, 2)}
    )
    assert ElementTree.fromstring(chart).tag == "svg"
    assert "currentColor" in chart
    assert INK not in chart
    assert ">a<" in chart
    assert ">b<" in chart
    assert ">x<" in chart
    assert "http" not in chart


def test_many_lines_have_no_legend():
    lines = {f"class {i}": ([0, 1], [0, i]) for i in range(20)}
    assert ">class 1<" not in line_chart(lines, "x", "y")
