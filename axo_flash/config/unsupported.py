"""Axolotl's keys that this trainer knows and does not serve: accepted while they are off, refused with the reason.

The names are those of Axolotl 0.19's schema and its plugins, and of the older releases that example files still carry.
"""

# reason (it follows "not supported: ", and ends with what to do where there is something better) -> keys
UNSUPPORTED_BY_REASON: dict[str, str] = {
    "a run uses one device, and is not sharded over several": """
        deepspeed deepcompile fsdp fsdp_config fsdp_version fsdp_final_state_dict_type fp32_norms fp32_norm_classes ddp
        ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters dp_shard_size dp_replicate_size
        sequence_parallel_degree context_parallel_size heads_k_stride ring_attn_func tensor_parallel_size
        expert_parallel_size qlora_sharded_model_loading use_ray world_size local_rank accelerator_config device
        device_map max_memory gpu_memory_limit lora_on_cpu""",
    "only supervised fine-tuning is done, neither preference tuning nor reward models nor distillation": """
        rl rl_beta trl vllm ebft reward_model process_reward_model center_rewards_coefficient num_labels
        dpo_use_weighting dpo_label_smoothing dpo_use_liger_kernel dpo_padding_free dpo_loss_type dpo_loss_weights
        dpo_beta dpo_use_logits_to_keep dpo_generate_during_eval dpo_norm_loss rpo_alpha precompute_ref_log_probs
        orpo_alpha simpo_gamma cpo_alpha kto_desirable_weight kto_undesirable_weight max_prompt_len kd_trainer
        nemo_gym_enabled hatchery""",
    "weights are loaded as they are, or in 4 or 8 bit by bitsandbytes (load_in_4bit, load_in_8bit)": """
        gptq gptq_groupsize gptq_model_v1 gptq_disable_exllama model_quantization_config bnb_config_kwargs
        qat quantization fp8 fp8_config use_onebitllms quantize_moe_experts nonexpert_quantization llmcompressor
        reinit_weights""",
    "adapters are plain LoRA and QLoRA": """
        relora relora_steps lisa_n_layers lisa_step_interval jagged_restart_steps peft peft_use_dora peft_use_rslora
        peft_layers_to_transform peft_layers_pattern peft_layer_replication peft_init_lora_weights
        peft_trainable_token_indices peft_ensure_weight_tying peft_autocast_adapter_dtype lora_target_parameters
        lora_rank_pattern lora_alpha_pattern lora_fan_in_fan_out loraplus_lr_ratio merge_lora mora
        unfrozen_parameters spectrum_top_fraction""",
    "attention is our kernels, or the model's own: set attn_implementation to axo_fa, sdpa or eager": """
        attention xformers_attention flex_attention flex_attn_compile_kwargs sage_attention s2_attention flash_optimum
        sdpa_varlen fused_attn_kernel large_head_attention flash_attn_d512 gemma4_hybrid_attn_impl scaling_softmax""",
    "no layer but attention is replaced": """
        flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp flash_attn_fuse_qkv lora_mlp_kernel
        lora_qkv_kernel lora_o_kernel lora_embedding_kernel unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv
        unsloth_lora_o unsloth_rms_norm unsloth_rope chunked_cross_entropy cut_cross_entropy use_eaft tiled_mlp
        use_kernels liger_rope liger_rms_norm liger_rms_norm_gated liger_layer_norm liger_swiglu liger_glu_activation
        liger_cross_entropy liger_fused_linear_cross_entropy liger_use_token_scaling""",
    "only Llama and Mistral decoders are trained, on text": """
        processor_type processor_kwargs image_size image_resize_algorithm role_boundaries freeze_mm_modules
        llama4_linearized_experts experts_implementation ple_cpu_offload is_falcon_derived_model is_qwen_derived_model
        expert_backend moe_grouped_backend moe_bnb_fast use_scattermoe use_sonicmoe use_dsv4_kernels use_glm_dsa_kernels
        dense_mixer diffusion""",
    "the model is loaded as its own files describe it: edit a local copy of its config.json": """
        model_config overrides_of_model_config model_kwargs overrides_of_model_kwargs rope_scaling base_model_config
        cls_model_config""",
    "the Hub's main revision or a local directory is loaded: download the revision and give its directory": """
        model_revision revision_of_model""",
    "the tokenizer is the one beside the model's weights; special_tokens and tokens change it": """
        tokenizer_config tokenizer_use_mistral_common added_tokens_overrides fix_untrained_tokens
        resize_token_embeddings_to_32x shrink_embeddings mean_resizing_embeddings embeddings_skip_upcast""",
    "dtypes are chosen by bf16, fp16 and tf32 (mixed precision)": "bfloat16 float16 float32 torch_dtype",
    "pretraining is fine-tuning on plain text: use datasets with type: completion, and streaming: true for many files": """
        pretraining_dataset pretrain_multipack_buffer_size pretraining_sample_concatenation""",
    "rows are always tokenised here: use streaming: true for data larger than the disk": """
        skip_prepare_dataset preprocess_iterable""",
    "the validation rows are as long as the others": "eval_sequence_len",
    "rows are packed best-fit first over the whole set, in an order that the seed decides": """
        max_packed_sequence_len sample_packing_sequentially sample_packing_mp_start_method sample_packing_eff_est
        curriculum_sampling multipack_real_batches batch_flattening shuffle_before_merging_datasets dataset_shard_num
        dataset_shard_idx dataset_exact_deduplication use_pose""",
    "nothing is pushed to the Hub: upload output_dir when the run is done": "hub_model_id push_dataset_to_hub",
    "progress is reported on the terminal, in run_report.json and to Weights & Biases (use_wandb) alone": """
        use_mlflow mlflow_tracking_uri mlflow_experiment_name mlflow_run_name use_comet comet_api_key comet_workspace
        comet_project_name comet_experiment_key comet_mode comet_experiment_config use_trackio trackio_project_name
        trackio_run_name trackio_space_id use_otel_metrics use_swanlab use_tensorboard profiler_steps""",
    "evaluation is the loss on the validation rows, at micro_batch_size": """
        eval_batch_size do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset eval_table_size
        generate_samples lm_eval_tasks""",
    "checkpoints are whole and resumable, and the newest are kept (save_total_limit)": """
        save_only_model save_first_step load_best_model_at_end metric_for_best_model greater_is_better
        dynamic_checkpoint""",
    "the optimizer is the Trainer's, with one learning rate for all parameters": """
        batch_size auto_find_batch_size optim_args optim_target_modules torchdistx_path embedding_lr embedding_lr_scale
        lr_groups lr_scheduler_kwargs lr_quadratic_warmup cosine_min_lr_ratio cosine_constant_lr_ratio lr_div_factor
        adam_epsilon2 adam_beta3 dion_lr dion_momentum neftune_noise_alpha noisy_embedding_alpha grokfast_alpha
        trainer_cls""",
    "saving memory by moving it off the device is not done: use gradient_checkpointing": """
        selective_checkpointing activation_offloading layer_offloading""",
    "the data loader is set up by the trainer": """
        dataloader_pin_memory dataloader_num_workers dataloader_prefetch_factor dataloader_drop_last
        dataset_keep_in_memory num_dataset_shards_to_save gc_steps torch_empty_cache_steps gc_collect_steps
        pad_to_multiple_of""",
    "the chat template is used as it is: write another in chat_template_jinja": """
        chat_template_kwargs default_system_message""",
    "the model is not compiled": "torch_compile",
    "Axolotl does not read it either: the key is adam_epsilon": "adam_eps",
    "only Axolotl's own programs set it": """
        is_preprocess total_num_tokens total_supervised_tokens axolotl_config_path debug""",
}

# A feature that is refused when on -> the keys that only tune it. They mean nothing while it is off, here as in
# Axolotl (whose example files carry some of them), so they may hold anything.
TUNES: dict[str, str] = {
    "eval_table_size": "eval_max_new_tokens eval_table_max_new_tokens",
    "generate_samples": """num_generation_samples generation_max_new_tokens generation_temperature generation_top_p
        generation_top_k generation_prompt_ratio generation_do_sample""",
    "bench_dataset": "bench_split",
    "lisa_n_layers": "lisa_layers_attribute",
    "relora_steps": "relora_warmup_steps relora_anneal_steps",
    "relora": "relora_prune_ratio relora_prune_method relora_cpu_offload",
    "jagged_restart_steps": "jagged_restart_warmup_steps jagged_restart_anneal_steps",
    "loraplus_lr_ratio": "loraplus_lr_embedding",
    "merge_lora": "merge_method",
    "model_quantization_config": "model_quantization_config_kwargs",
    "fp8": "fp8_enable_fsdp_float8_all_gather",
    "use_eaft": "eaft_alpha eaft_k",
    "tiled_mlp": "tiled_mlp_num_shards tiled_mlp_use_original_mlp",
    "chunked_cross_entropy": "chunked_cross_entropy_num_chunks",
    "scaling_softmax": "scaling_softmax_factor scaling_softmax_bias",
    "torch_compile": "torch_compile_backend torch_compile_mode torch_compile_options",
    "pretraining_dataset": "pretrain_multipack_attn",
    "use_pose": "pose_split_on_token_ids pose_max_context_len pose_num_chunks",
    "max_packed_sequence_len": "sample_packing_group_size sample_packing_bin_size",
    "hub_model_id": "hub_strategy hub_revision",
    "use_mlflow": "hf_mlflow_log_artifacts",
    "use_comet": "comet_online",
    "use_otel_metrics": "otel_metrics_host otel_metrics_port",
    "use_ray": "ray_run_name ray_num_workers resources_per_worker",
    "profiler_steps": "profiler_steps_start",
    "dion_lr": "dion_rank_fraction dion_rank_multiple_of",
    "optim_target_modules": """qgalore_rank qgalore_update_proj_gap qgalore_scale qgalore_proj_type qgalore_proj_quant
        qgalore_proj_bits qgalore_proj_group_size qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size""",
    "grokfast_alpha": "grokfast_lamb",
    "spectrum_top_fraction": "spectrum_model_name",
    "lm_eval_tasks": "lm_eval_batch_size lm_eval_post_train lm_eval_model",
    "liger_rope": "liger_kernel_impl",
    "kd_trainer": """kd_ce_alpha kd_alpha kd_temperature kd_beta kd_normalize_topk kd_online_server_base_url
        kd_online_topk kd_online_server kd_online_timeout kd_temperature_min""",
    "nemo_gym_enabled": """nemo_gym_dir nemo_gym_auto_clone nemo_gym_config_paths nemo_gym_head_port
        nemo_gym_server_timeout nemo_gym_verify_timeout nemo_gym_run_timeout nemo_gym_datasets nemo_gym_auto_start
        nemo_gym_model_name nemo_gym_multi_turn nemo_gym_max_turns""",
    "expert_parallel_size": """expert_parallel_backend expert_parallel_num_nvl_bytes expert_parallel_num_rdma_bytes
        expert_parallel_token_capacity expert_parallel_fallback_on_unsupported""",
    "expert_backend": """moe_dequant_chunk_size dsv4_fp8_nonexpert_mode dsv4_fp8_lora_kernel
        dsv4_shared_mlp_lora_kernel dsv4_bf16_all dsv4_fp4_grouped_mode gemma4_fp8_nonexpert gemma4_nf4_nonexpert
        nvfp4_merge_aware nvfp4_merge_aware_start_step""",
    "use_swanlab": """swanlab_project swanlab_experiment_name swanlab_description swanlab_mode swanlab_workspace
        swanlab_api_key swanlab_log_model swanlab_web_host swanlab_api_host swanlab_lark_webhook_url swanlab_lark_secret
        swanlab_log_completions swanlab_completion_log_interval swanlab_completion_max_buffer""",
    # `axolotl inference --gradio` alone reads these: not a training run
    "is_preprocess": """gradio_title gradio_share gradio_server_name gradio_server_port gradio_max_new_tokens
        gradio_temperature""",
}

# What this trainer always does: key -> (the only values that say so, what is so). Null is accepted too, of course.
ALWAYS: dict[str, tuple[tuple, str]] = {
    "strict": ((False, True), "a misspelt key is always an error"),
    "save_safetensors": ((True,), "weights are always saved as safetensors"),
    "tokenizer_save_jinja_files": ((True,), "the chat template is saved with the tokenizer"),
    "tokenizer_use_fast": ((True,), "transformers 5 has fast tokenizers alone"),
    "tokenizer_legacy": ((True, False), "the tokenizer's own files decide"),
    "low_cpu_mem_usage": ((True,), "weights are always loaded that way"),
    "experimental_skip_move_to_device": ((True, False), "one device: there is nothing to skip"),
    "remove_unused_columns": ((True, False), "the prepared rows hold what the model takes and nothing else"),
    "hf_use_auth_token": ((True, False), "the token of `hf auth login` or HF_TOKEN is always used"),
    "is_llama_derived_model": ((True, False), "the model's own config.json says what it is"),
    "is_mistral_derived_model": ((True, False), "the model's own config.json says what it is"),
    "shuffle_merged_datasets": ((True,), "rows are always shuffled, by the seed"),
    "include_tkps": ((True,), "tokens per second are always reported"),
    "include_tokens_per_second": ((True,), "tokens per second are always reported"),
    "min_sample_len": ((2,), "rows of fewer than 2 tokens are always dropped"),
}

DATASET_UNSUPPORTED_BY_REASON: dict[str, str] = {
    "datasets are data, never programs: convert it to files once": "trust_remote_code",
    "the newest revision on the Hub is read: download the one wanted, and give its directory": "revision",
    "prepared sets are cached whole": "preprocess_shards",
    "this prompt format is gone from Axolotl: use type: chat_template": "conversation field_human field_model",
    "only supervised rows are read": """field_chosen field_rejected field_prompt prompt_format chosen_format
        rejected_format step_separator max_completion_length train_on_last_step_only logprobs_field temperature""",
    "tools and reasoning traces are not read": "field_tools field_thinking template_thinking_key split_thinking",
    "rows are read as they are": "input_transform input_format text_column skip",
    "synthetic data is not made": "length sequence_length min_input_id max_input_id seed",
}


def _by_key(by_reason: dict[str, str]) -> dict[str, str]:
    return {key: reason for reason, keys in by_reason.items() for key in keys.split()}


UNSUPPORTED: dict[str, str] = _by_key(UNSUPPORTED_BY_REASON)  # key -> reason
TUNING: dict[str, str] = _by_key(TUNES)  # key -> the feature it tunes
DATASET_UNSUPPORTED: dict[str, str] = _by_key(DATASET_UNSUPPORTED_BY_REASON)

# Axolotl's other names of keys that act
RENAMED: dict[str, str] = {
    "type_of_model": "model_type",
    "dataset_processes": "dataset_num_proc",
    "evaluation_strategy": "eval_strategy",
}
