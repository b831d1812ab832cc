#!/usr/bin/env python3
"""SAE feature statistics of a language model: runs gradlens, and loads what it saved.

As a script it runs the program ``gradlens sae`` with the flags it is given, unchanged, so that command lines of the
Python script of this name go on working::

    python sae_gradient_analysis.py --layers 0-3 --aggregate_by gradients --save_outputs

As a module it loads results::

    from sae_gradient_analysis import load_results

    results = load_results("sae_features_model_…")         # a results folder, or an .npz
    results["data"]["layer_0_mean_abs"]                    # float32 [F]

Everything else is as in ``layer_gradient_analysis``, which lies beside this file.
"""

import sys

from layer_gradient_analysis import load_results, main

__all__ = ["load_results"]

if __name__ == "__main__":
    sys.exit(main("sae"))
