"""lm-eval called directly, with definitions of three tasks written out by hand."""

from __future__ import annotations

import json
from pathlib import Path


def lm_evals_own(model: Path, data: Path, scratch: Path) -> dict[str, dict[str, float]]:
    """What ``lm_eval --model hf`` says; the definitions are written out by hand."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    definitions: dict[str, tuple[str, str, dict[str, object]]] = {
        "own_piqa": (
            "json",
            "piqa.jsonl",
            {
                "doc_to_text": "Question: {{goal}}\nAnswer:",
                "doc_to_target": "label",
                "doc_to_choice": "{{[sol1, sol2]}}",
            },
        ),
        "own_boolq": (
            "json",
            "boolq/validation.json",
            {
                "doc_to_text": "{{passage}}\nQuestion: {{question}}?\nAnswer:",
                "doc_to_target": "label",
                "doc_to_choice": ["no", "yes"],
            },
        ),
        "own_openbookqa": (
            "parquet",
            "openbookqa.parquet",
            {
                "doc_to_text": "question_stem",
                "doc_to_target": "{{'ABCD'.index(answerKey)}}",
                "doc_to_choice": "{{choices.text}}",
            },
        ),
    }
    for name, (reader, file, meaning) in definitions.items():
        definition = {
            "task": name,
            "dataset_path": reader,
            "dataset_kwargs": {
                "data_files": {"test": str(data / file)},
                "cache_dir": str(scratch / "cache"),
            },
            "test_split": "test",
            "output_type": "multiple_choice",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            **meaning,
        }
        (scratch / f"{name}.yaml").write_text(json.dumps(definition))
    found = simple_evaluate(
        "hf",
        model_args={"pretrained": str(model), "dtype": "float32", "device": "cpu"},
        tasks=list(definitions),
        task_manager=TaskManager(include_path=str(scratch), include_defaults=False),
    )
    results: dict[str, dict[str, float]] = found["results"]
    return results
