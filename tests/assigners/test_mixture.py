import warnings

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

from atss.assigners.mixture import mixture

ROWS = {
    "52 iterations": [0, 4, 4, 6, 7, 8, 9, 10, 11, 11],
    "53 iterations": [0, 0.4, 0.5, 0.6, 0.6, 1.2, 1.4, 2, 2.1, 2.5, 3, 3.5, 3.6, 4.7, 6.4],
    "all equal": [2.5, 2.5, 2.5],
    "two": [1, 3],
}


def test_mixture_equals_scikit_learn():
    """Rows of several lengths at once, each as if alone, also those of many iterations; of equal
    likelihoods the cheaper component."""
    width = max(map(len, ROWS.values()))
    values = torch.full((len(ROWS), width), torch.inf, dtype=torch.float64)
    for row, costs in zip(values, ROWS.values(), strict=True):
        row[: len(costs)] = torch.tensor(costs, dtype=torch.float64)
    good, density = mixture(values)
    iterations = {}
    for i, (name, costs) in enumerate(ROWS.items()):
        x = np.array(costs, dtype=float)[:, None]
        model = GaussianMixture(
            2,
            weights_init=[0.5, 0.5],
            means_init=[x.min(axis=0), x.max(axis=0)],
            precisions_init=np.ones((2, 1)),
            covariance_type="diag",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(x)
        iterations[name] = model.n_iter_
        size = len(costs)
        assert good[i].tolist() == [*(model.predict(x) == 0), *[False] * (width - size)], name
        np.testing.assert_allclose(density[i, :size], model.score_samples(x), rtol=1e-6)
        assert (density[i, size:] == -torch.inf).all()
    assert min(sorted(iterations.values())[-2:]) > 50  # some rows have many iterations


def test_mixture_with_an_outlier():
    """Squares of 5e5 leave no digits for a variance of 1e-6, which rounding can make negative."""
    costs = [0.9986, 0.9996, 1.0006, 1.0011, 1.0012, 1e6]
    good, density = mixture(torch.tensor([costs], dtype=torch.float64))
    assert good.tolist() == [[True] * 5 + [False]]
    assert density.isfinite().all()
