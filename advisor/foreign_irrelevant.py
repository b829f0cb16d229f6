"""Keys of other trainers that decide neither memory nor speed of a training step."""

from __future__ import annotations

import re

#: Logging, saving, evaluation, data, learning rates, seeds, names, hubs, by the start of the key.
_STARTS = (
    "adam_", "api_", "comet_", "cosine_", "dataloader_", "dataset", "do_", "early_stopping",
    "eval_", "evals_", "evaluation_", "export_", "gradio_", "greater_is", "hf_", "hub_", "init_",
    "jagged_", "load_best", "log_", "logging_", "lr_", "metric_", "mlflow_", "otel_",
    "preprocessing_", "push_", "resume_", "run_", "save_", "saves_", "swanlab_", "tokenizer_",
    "trackio_", "use_comet", "use_mlflow", "use_otel", "use_swanlab", "use_tensorboard",
    "use_trackio", "use_wandb", "wandb_", "warmup_", "image_", "video_", "infer_", "vllm_",
    "profiler_", "sample_packing_", "shuffle_", "include_", "ddp_", "ms_hub", "om_hub", "plot_",
)  # fmt: skip
_KEYS = frozenset({
    "added_tokens_overrides", "auto_resume_from_checkpoints", "average_tokens_across_devices",
    "base_model_config", "buffer_size", "cache_dir", "chat_template", "chat_template_jinja",
    "chat_template_kwargs", "cls_model_config", "data_seed", "data_shared_file_system", "datasets",
    "debug", "decontaminate", "default_system", "default_system_message", "device_map",
    "disable_shuffling", "disable_tqdm", "enable_thinking", "eot_tokens", "excess_length_strategy",
    "fix_untrained_tokens", "full_determinism", "gradient_checkpointing_kwargs", "hub_token",
    "ignore_pad_token_for_loss", "interleave_probs", "is_falcon_derived_model",
    "is_llama_derived_model", "is_mistral_derived_model", "is_qwen_derived_model", "label_names",
    "learning_rate", "local_rank", "low_cpu_mem_usage", "mask_history", "max_grad_norm",
    "max_samples", "max_steps", "media_dir", "min_sample_len", "mix_strategy", "model_revision",
    "model_type", "num_epochs", "num_train_epochs", "output_dir", "overwrite_cache",
    "overwrite_output_dir", "pad_to_sequence_len", "pretraining_dataset", "processor_kwargs",
    "processor_type", "project", "remove_unused_columns", "report_to", "resize_vocab",
    "revision_of_model", "role_boundaries", "seed", "special_tokens", "split_special_tokens",
    "strict", "template", "test_datasets", "tf32", "tokenized_path", "tokens", "tool_format",
    "train_on_inputs", "train_on_prompt", "trust_remote_code", "type_of_model", "use_cpu",
    "use_fast_tokenizer", "use_reentrant_gc", "use_rslora", "peft_use_rslora", "val_set_size",
    "val_size", "weight_decay", "per_device_eval_batch_size", "streaming", "preserve_thinking",
    "add_tokens", "add_special_tokens", "print_param_status", "rl_beta", "dpo_beta", "pref_beta",
    "pref_loss", "pref_ftx", "loraplus_lr_ratio", "loraplus_lr_embedding", "skip_memory_metrics",
    "loss_watchdog_threshold", "loss_watchdog_patience", "lora_model_dir", "adapter_name_or_path",
    "create_new_adapter", "predict_with_generate", "eval_packing", "random_state", "dtype",
    "max_seq_length", "bias", "task_type", "exclude_modules", "output", "cosine_min_lr_ratio",
    "auto_find_dataset", "liger_kernel_config", "embeddings_skip_upcast", "use_cache",
    "sdpa_varlen", "multipack_real_batches", "gc_steps", "gc_collect_steps", "optim_args",
})  # fmt: skip
_PATTERN = re.compile("|".join(map(re.escape, _STARTS)))


def is_irrelevant(key: str) -> bool:
    """Whether a key decides neither memory nor speed of a step."""
    return key in _KEYS or _PATTERN.match(key) is not None
