"""The file that transformers' Trainer leaves of a run."""

import json


def trainer_state(path, evaluations, *, metric="eval_loss", training=True):
    """Write what transformers' TrainerState.save_to_json writes: (step, loss) -> trainer_state.json."""
    history = []
    for step, loss in evaluations:
        if training and step:
            log = {"epoch": step / 10, "grad_norm": 0.7, "learning_rate": 1e-4, "loss": loss + 0.3, "step": step}
            history.append(log)
        evaluation = {"epoch": step / 10, metric: loss, "eval_runtime": 1.5, "eval_samples_per_second": 100.0}
        history.append({**evaluation, "eval_steps_per_second": 12.5, "step": step})
    last = max((step for step, _ in evaluations), default=0)
    state = {
        "best_global_step": None,
        "best_metric": None,
        "best_model_checkpoint": None,
        "epoch": 2.0,
        "eval_steps": 50,
        "global_step": last,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": history,
        "logging_steps": 10,
        "max_steps": last,
        "num_train_epochs": 2,
        "save_steps": 50,
        "stateful_callbacks": {},
        "total_flos": 7.8e15,
        "train_batch_size": 8,
        "trial_name": None,
        "trial_params": None,
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "trainer_state.json").write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")
