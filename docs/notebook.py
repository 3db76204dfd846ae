#!/usr/bin/env python3
"""Run docs/quickstart.ipynb in the current folder, and write it with its outputs:

    mkdir -p output/notebook && cd output/notebook && python ../../docs/notebook.py

Pictures are stored as JPEG; long texts keep losses and their last lines.
"""

import argparse
import ast
import base64
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).resolve().with_name("quickstart.ipynb")
LINES, WIDTH = 12, 140


def run(cells: list[dict]) -> None:
    """Run the code cells in order, and set their outputs."""
    names: dict = {"__name__": "__main__"}
    printed = io.StringIO()
    code_cells = [x for x in cells if x["cell_type"] == "code"]
    with redirect_stdout(printed):
        for number, cell in enumerate(code_cells, start=1):
            start = printed.tell()
            *statements, last = ast.parse("".join(cell["source"])).body
            if not isinstance(last, ast.Expr):
                statements.append(last)
            exec(compile(ast.Module(statements, []), f"cell {number}", "exec"), names)
            value = None
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
            texts = _stream(printed.getvalue()[start:])
            results = [] if value is None else [_result(value, number)]
            cell |= {"execution_count": number, "outputs": texts + results}


def _stream(text: str) -> list[dict]:
    lines = [x if len(x) <= WIDTH else f"{x[:WIDTH]} ..." for x in text.splitlines()]
    if len(lines) > LINES:
        above, end = lines[:-LINES], lines[-LINES:]
        losses = [x for x in above if "loss_cls" in x]
        lines = [f"({len(above) - len(losses)} other lines)", *losses, "...", *end]
    return [{"output_type": "stream", "name": "stdout", "text": _split(lines)}] if lines else []


def _result(value: Any, number: int) -> dict:
    data = {"text/plain": _split(repr(value).splitlines())}
    if hasattr(value, "convert"):  # a picture of Pillow
        out = io.BytesIO()
        value.convert("RGB").save(out, "JPEG", quality=85)
        data = {
            "image/jpeg": base64.b64encode(out.getvalue()).decode(),
            "text/plain": [f"<picture of {value.width} x {value.height} pixels>"],
        }
    return {
        "output_type": "execute_result",
        "execution_count": number,
        "metadata": {},
        "data": data,
    }


def _split(lines: list[str]) -> list[str]:
    return [f"{x}\n" for x in lines[:-1]] + lines[-1:]


def markdown(notebook: dict) -> str:
    """Return a notebook as Markdown, for the site."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/jpeg" in data:
                parts.append(f'<img src="data:image/jpeg;base64,{data["image/jpeg"]}" alt="">')
            else:
                parts.append(f"```text\n{''.join(data['text/plain'])}\n```")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Run docs/quickstart.ipynb.")
    parser.add_argument("--output", type=Path, default=NOTEBOOK, help="default: the notebook")
    args = parser.parse_args()
    notebook = json.loads(NOTEBOOK.read_text())
    run(notebook["cells"])
    args.output.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
