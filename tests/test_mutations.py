from importlib.util import module_from_spec, spec_from_file_location

from mutations import mutants_of, plant

SOURCE = '''
def below(numbers, limit=3):
    """The docstring stays."""
    return [x for x in numbers if x < limit + 1]

class Gate:
    def check(self, x):
        if x is None:
            raise ValueError("none")
        return (lambda: x)()
'''


def load(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(SOURCE)
    spec = spec_from_file_location("small", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return path, module


def test_mutants_of_a_module(tmp_path):
    path, _ = load(tmp_path)
    found = [(x.key, x.line) for x in mutants_of(path, "small.py")]
    whole = "[x for x in numbers if x < limit + 1]"
    test = "if x is None:"
    assert found == [
        (f"small.py below: return {whole}  ->  return None", 4),
        ("small.py below:  for x in numbers if x < limit + 1  ->   for x in numbers", 4),
        ("small.py below: x < limit + 1  ->  x <= limit + 1", 4),
        ("small.py below: limit + 1  ->  limit - 1", 4),
        ("small.py below: 1  ->  2", 4),
        (f"small.py Gate.check: {test}  ->  if True:", 8),
        (f"small.py Gate.check: {test}  ->  if False:", 8),
        ("small.py Gate.check: x is None  ->  x is not None", 8),
        ("small.py Gate.check: raise ValueError('none')  ->  pass", 9),
        ("small.py Gate.check: return (lambda: x)()  ->  return None", 10),
    ]


def test_a_planted_mutant_replaces_the_code(tmp_path):
    path, module = load(tmp_path)
    functions = [module.below, module.Gate.check]
    found = {}
    for mutant in mutants_of(path, "small.py"):
        assert plant(path, mutant.tree, functions)
        try:
            found[mutant.key.split("  ->  ")[1]] = module.below(range(6)), module.Gate().check(1)
        except ValueError:
            found[mutant.key.split("  ->  ")[1]] = "raised"
    assert found == {
        "return None": ([0, 1, 2, 3], None),
        " for x in numbers": ([0, 1, 2, 3, 4, 5], 1),
        "x <= limit + 1": ([0, 1, 2, 3, 4], 1),
        "limit - 1": ([0, 1], 1),
        "2": ([0, 1, 2, 3, 4], 1),
        "if True:": "raised",
        "if False:": ([0, 1, 2, 3], 1),
        "x is not None": "raised",
        "pass": ([0, 1, 2, 3], 1),
    }
