"""What other tools call our keys, so that an error can name the right one.

Taken from nanoGPT and nanochat, Hugging Face transformers, PyTorch Lightning, litgpt, torchtitan
and fairseq.
"""

from __future__ import annotations

_NAMES = {
    "name": "run_name experiment experiment_name wandb_run_name",
    "handlers": "callbacks",
    "data.source": "path file data_path dataset dataset_path data_dir train_file train_data input"
    " text_file corpus",
    "data.sequence_length": "block_size context_length context_len context_size seq_len seq_length"
    " max_seq_len max_seq_length max_length max_sequence_length n_ctx n_positions"
    " max_position_embeddings ctx_len",
    "data.batch_size": "bs micro_batch_size device_batch_size train_batch_size"
    " per_device_train_batch_size local_batch_size",
    "data.global_batch": "global_batch_size gbs total_batch_size effective_batch_size",
    "data.tokenizer": "tokenizer_name tokenizer_path",
    "data.split": "val_split train_split val_fraction",
    "model.d_model": "n_embd n_embed hidden_size embed_dim embedding_dim hidden_dim dim model_dim",
    "model.num_layers": "n_layer n_layers layers num_hidden_layers depth",
    "model.num_heads": "n_head n_heads heads num_attention_heads",
    "model.num_kv_heads": "n_kv_head n_kv_heads num_key_value_heads n_query_groups",
    "model.d_ff": "intermediate_size ffn_dim ff_dim hidden_ff mlp_dim n_inner",
    "training.total_steps": "max_steps steps num_steps max_iters iters num_iterations max_updates"
    " train_steps num_train_steps num_training_steps",
    "training.num_epochs": "epochs max_epochs num_train_epochs",
    "training.learning_rate": "lr max_lr peak_lr base_lr",
    "training.min_learning_rate": "min_lr end_lr",
    "training.warmup_steps": "warmup warmup_iters num_warmup_steps lr_warmup_steps warmup_updates",
    "training.scheduler": "lr_scheduler lr_scheduler_type schedule lr_schedule",
    "training.optimizer": "optim optimizer_name",
    "training.optimizer_weight_decay": "weight_decay wd",
    "training.optimizer_eps": "adam_epsilon eps",
    "training.max_grad_norm": "grad_clip gradient_clip gradient_clip_val clip_grad_norm max_norm"
    " clip_norm",
    "training.accumulation_steps": "gradient_accumulation_steps grad_accum grad_accum_steps"
    " accumulate_grad_batches grad_accumulation_steps update_freq",
    "training.gradient_checkpointing": "activation_checkpointing",
    "training.eval_steps": "eval_interval eval_every val_interval val_check_interval",
    "training.log_steps": "log_interval logging_steps log_every log_every_n_steps",
    "training.checkpoint_steps": "save_steps save_interval save_every checkpoint_interval"
    " ckpt_interval",
    "training.keep_last": "save_total_limit save_top_k",
    "training.precision": "dtype amp torch_dtype",
    "training.device": "accelerator",
    "training.checkpoint_dir": "save_dir ckpt_dir",
}
OTHER_NAMES = {other: ours for ours, others in _NAMES.items() for other in others.split()}
"""Another tool's key -> ours, dotted."""
