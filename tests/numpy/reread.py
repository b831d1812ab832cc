"""Re-reads one results folder and its consolidated archive the way users do.

Usage: python -W error reread.py FOLDER ARCHIVE. Every warning is an error, because NumPy warns where a pickle names
modules that have moved. What is expected comes from metadata.json and from the record in tests/formats/record.rs.
"""

import io
import json
import os
import sys

import numpy as np

folder, archive = sys.argv[1:]

with open(os.path.join(folder, "metadata.json"), encoding="utf-8") as file:
    described = json.load(file, parse_constant=lambda name: sys.exit(f"{name} in metadata.json"))
with open(os.path.join(folder, "timing_stats.json"), encoding="utf-8") as file:
    timing = json.load(file)
config = described["analysis_config"]

# The metadata dict.
results = np.load(archive, allow_pickle=True)
boxed = results["metadata"]
assert boxed.shape == (1,) and boxed.dtype == object, (boxed.shape, boxed.dtype)
metadata = boxed.item()
assert type(metadata) is dict
contract = (
    "model_name num_samples batch_size max_length layers aggregation_mode normalization_mode aggregate_by power "
    "device timestamp dimension_sizes"
).split()
assert list(metadata)[: len(contract)] == contract, list(metadata)
assert metadata["dimension_sizes"] == {0: 3, 7: 3}
assert metadata["num_samples_used"] == 2
assert metadata["timestamp"] == "20250102_030405"
assert metadata["device"] == "cpu" and metadata["model_name"] == "org/tiny-\u00e9"
for key in ("layers", "aggregation_mode", "normalization_mode", "aggregate_by", "power"):
    assert metadata[key] == config[key], key
for key, value in described["run_info"].items():
    if key != "device":
        assert metadata[key] == value and type(metadata[key]) is type(value), (key, metadata[key], value)
assert [type(item) for item in metadata["floats"]] == [float] * 4
assert metadata["nested"] == {"a": {"b": [[], {}, [True]]}}

# The arrays, in the archive and as files.
aggregations = {"both": ["mean", "mean_abs"]}.get(config["aggregation_mode"], [config["aggregation_mode"]])
labels = {"both": ["_norm_sum", "_norm_sum_abs"], "all": ["_norm_none", "_norm_sum", "_norm_sum_abs"]}
keys = [
    f"layer_{layer}_{aggregation}{label}"
    for layer in config["layers"]
    for aggregation in aggregations
    for label in labels.get(config["normalization_mode"], [""])
]
assert sorted(results.keys()) == sorted(keys + ["metadata"]), list(results.keys())
for key in keys:
    values = results[key]
    assert values.shape == (3,) and values.dtype == np.dtype("float32"), key
    path = os.path.join(folder, key + "_gradients.npy")
    assert np.array_equal(np.load(path), values), key
    rewritten = io.BytesIO()
    np.save(rewritten, values)
    with open(path, "rb") as file:
        assert file.read() == rewritten.getvalue(), key
files = [name[: -len("_gradients.npy")] for name in os.listdir(folder) if name.endswith("_gradients.npy")]
assert sorted(files) == sorted(keys)


def check_statistics(values, found):
    wide = values.astype(np.float64)
    expected = {"mean": wide.mean(), "std": wide.std(), "max": np.abs(wide).max(), "sum_abs": np.abs(wide).sum()}
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.isclose(found[name], expected[name], rtol=1e-12, atol=1e-300), (name, found, expected)


for key in keys:
    layer, variant = key.split("_")[1], key.split("_", 2)[2]
    level = described["layer_statistics"]["layer_" + layer]
    aggregation, _, label = variant.partition("_norm_")
    if config["aggregation_mode"] == "both":
        level = level[aggregation]
    if label:
        level = level["norm_" + label]
    check_statistics(results[key], level)
    if label == "sum_abs" or config["normalization_mode"] == "sum_abs":
        assert np.isclose(np.abs(results[key]).sum(), 3, rtol=1e-6), key

# The raw statistics need no pickle.
statistics = np.load(os.path.join(folder, "statistics.npz"))
total, count = statistics["layer_0.mlp.gradients.sum"], statistics["layer_0.mlp.gradients.count"]
assert total.dtype == np.float64 and total.tolist() == [0.5, -0.3, 0.2]
assert count.dtype == np.int64 and count.shape == () and int(count) == 1 << 40

# The rest of the JSON.
assert timing["overall"] == described["timing_stats"] and timing["per_layer"] == described["per_layer_timing"]
assert set(timing["per_layer"]) == {"0", "7"} and "total" in timing["per_layer"]["0"]
assert described["dimension_info"] == {"layer_0": 3, "layer_7": 3}
exec_scope = {}
os.chdir(os.path.dirname(archive))
code = "\n".join(described["loading_instructions"]["example_code"])
exec(code.replace("consolidated_results.npz", os.path.basename(archive)), exec_scope)
assert exec_scope["metadata"] == metadata and exec_scope["values"].shape == (3,)

print(f"NumPy {np.__version__} on Python {sys.version.split()[0]}: {len(keys)} arrays re-read from {os.path.basename(archive)}")
