"""The mutants: a promise, the line that carries it, what the line is replaced by, and the test that must notice."""

from dataclasses import dataclass

KEYS = "tests/ray/config/test_every_key.py::test_changing_a_key_changes_what_it_names"
MECHANISMS = "tests/ray/train/test_mechanisms.py"
LLAVA = "tests/unit/models/test_llava.py"
LOSS = "tests/unit/models/test_loss.py"
ATTENTION = "tests/unit/models/test_attention.py"
PLAN = "tests/unit/train/test_batch_plan.py"
LOADER = "tests/unit/train/test_data_loader.py"
RAY = "tests/ray/train/test_ray_backend.py"
PREPARE = "tests/unit/corpus/test_prepare.py"
OPERATORS = "tests/unit/corpus/test_operators.py"
GROUPS = "tests/unit/train/test_loss_groups.py"
CONNECTOR = "tests/unit/models/test_connector.py"
STUDY = "tests/unit/tune/test_study.py"
ENDPOINTS = "tests/unit/evaluation/test_endpoints.py"
PAGES = "tests/unit/pipeline/test_run_report.py"


@dataclass(frozen=True)
class Mutant:
    """`line` occurs once in `file`; `test` is a pytest node id."""

    promise: str
    file: str
    line: str
    replacement: str
    test: str


def _in(file: str, *entries: tuple[str, str, str, str]) -> list[Mutant]:
    """Return the mutants of one file from (promise, line, replacement, test)."""
    return [Mutant(promise, file, line, replacement, test) for promise, line, replacement, test in entries]


MUTANTS = [
    *_in(
        "raylava/train/engine.py",
        (
            "gradients are clipped",
            '"gradient_clipping": training.max_grad_norm or 0.0,',
            '"gradient_clipping": 0.0,',
            f"{MECHANISMS}::test_gradients_above_the_norm_are_clipped",
        ),
        (
            "the connector has its own rate",
            '"connector": training.connector_lr or training.lr,',
            '"connector": training.lr,',
            f"{KEYS}[finetune.connector_lr]",
        ),
        (
            "the vision tower has its own rate",
            "vision=training.vision_lr is not None)",
            "vision=False)",
            f"{KEYS}[finetune.vision_lr]",
        ),
        ("compile compiles", "if training.compile:", "if False:", f"{KEYS}[finetune.compile]"),
        (
            "the optimizer is offloaded",
            "if training.zero.offload_optimizer:",
            "if False:",
            f"{KEYS}[finetune.zero.offload_optimizer]",
        ),
        (
            "parameters are offloaded",
            "if training.zero.offload_parameters:",
            "if False:",
            f"{KEYS}[finetune.zero.offload_parameters]",
        ),
        (
            "the ZeRO stage is the recipe's",
            'zero: dict[str, Any] = {"stage": training.zero.stage,',
            'zero: dict[str, Any] = {"stage": 2,',
            f"{KEYS}[finetune.zero.stage]",
        ),
        (
            "activations are recomputed",
            "if training.activation_checkpointing:",
            "if False:",
            f"{KEYS}[finetune.activation_checkpointing]",
        ),
        (
            "weights decay",
            "decay = training.weight_decay if decays else 0.0",
            "decay = 0.0",
            f"{KEYS}[finetune.weight_decay]",
        ),
        ("betas reach Adam", "betas=training.betas, ", "", f"{KEYS}[finetune.betas]"),
        ("eps reaches Adam", "eps=training.eps, ", "", f"{KEYS}[finetune.eps]"),
        (
            "the rate follows the schedule",
            'group["lr"] = group["peak_lr"] * factor',
            'group["lr"] = group["peak_lr"]',
            f"{MECHANISMS}::test_learning_rate_of_each_step_is_the_one_that_the_optimizer_uses",
        ),
        (
            "the connector is exported from fp32 weights",
            "in_fp32=name.startswith(CONNECTOR) and parameter.requires_grad",
            "in_fp32=False",
            f"{MECHANISMS}::test_connector_of_a_bf16_run_is_kept_in_fp32_at_every_zero_stage",
        ),
        (
            "the rate warms up",
            'return (step if training.warmup_start == "zero" else step + 1) / warmup',
            "return 1.0",
            "tests/unit/train/test_engine.py::test_learning_rate_warms_up_linearly_and_decays_as_a_cosine_to_zero",
        ),
        (
            "the engine checks which attention runs",
            "        assert not mismatch, mismatch\n",
            "",
            f"{MECHANISMS}::test_engine_refuses_a_model_that_runs_another_attention_than_the_recipe",
        ),
        (
            "DeepSpeed's own settings are passed on",
            '"enabled": False}}} | training.deepspeed',
            '"enabled": False}}}',
            f"{KEYS}[finetune.deepspeed]",
        ),
        (
            "the dry run computes its packs",
            "self._update(self._accumulate(packs))",
            "self._update(self._accumulate([]))",
            f"{MECHANISMS}::test_memory_dry_run_computes_the_worst_case_packs",
        ),
        (
            "the dry run's update is forgotten",
            "                value.zero_()\n",
            "                pass\n",
            "tests/ray/train/test_engine.py::test_memory_dry_run_does_not_change_training",
        ),
        (
            "the dry run changes no weight",
            '            group["lr"] = 0.0\n',
            '            group["lr"] = 1e-4\n',
            "tests/ray/train/test_engine.py::test_memory_dry_run_does_not_change_training",
        ),
    ),
    *_in(
        "raylava/train/trainer.py",
        (
            "memory is tried before the first step",
            "dry_run = self._memory_dry_run()",
            'dry_run = "none"',
            f"{MECHANISMS}::test_run_reports_its_dry_run_and_every_mechanism_before_the_first_step",
        ),
        (
            "non-finite steps in a row end the run",
            "if self._consecutive_skips < self._spec.training.max_consecutive_skips:",
            "if self._consecutive_skips < 5:",
            f"{KEYS}[finetune.max_consecutive_skips]",
        ),
        (
            "trackers are built",
            "first_step, spec.tracking, settings)",
            "first_step, type(spec.tracking)(), settings)",
            f"{KEYS}[tracking.mlflow]",
        ),
        (
            "mechanisms are reported",
            "        if self._backend.rank == 0:\n            self._announce_mechanisms(loader, dry_run)\n",
            "",
            f"{MECHANISMS}::test_run_reports_its_dry_run_and_every_mechanism_before_the_first_step",
        ),
        (
            "the recipe's attention is asked for",
            "DTYPES[training.precision], training.attn_implementation)",
            'DTYPES[training.precision], "varlen")',
            f"{KEYS}[finetune.attn_implementation]",
        ),
    ),
    *_in(
        "raylava/train/checkpoints.py",
        (
            "checkpoints are saved by minutes",
            "due = now - self._saved_at >= config.interval_minutes * 60",
            "due = False",
            f"{MECHANISMS}::test_checkpoints_are_saved_at_the_interval",
        ),
        (
            "checkpoints are saved by steps",
            "if config.interval_steps is not None and next_step - self._saved_step >= config.interval_steps:",
            "if False:",
            f"{MECHANISMS}::test_checkpoints_are_saved_at_the_interval",
        ),
        (
            "a run without a checkpoint saves one halfway",
            "if not self._checkpoints and 2 * next_step >= self._steps:",
            "if False:",
            f"{MECHANISMS}::test_run_without_a_due_checkpoint_saves_one_halfway",
        ),
        (
            "uploads are retried for the recipe's time",
            "self._config.upload_timeout_minutes * 60, lambda",
            "1800.0, lambda",
            f"{KEYS}[finetune.checkpoint.upload_timeout_minutes]",
        ),
    ),
    *_in(
        "raylava/train/spec.py",
        (
            "the plan depends on the seed",
            "return plan_batches(training, seed, blocks.lengths, windows)",
            "return plan_batches(training, 0, blocks.lengths, windows)",
            f"{MECHANISMS}::test_samples_of_a_step_depend_on_the_seed",
        ),
        (
            "large corpora are shuffled in windows",
            "1e9 * training.shuffle_window_gb,",
            "1e18,",
            f"{KEYS}[finetune.shuffle_window_gb]",
        ),
    ),
    *_in(
        "raylava/corpus/fetch.py",
        (
            "private addresses are not fetched from",
            "if private and not self.config.allow_private_addresses:",
            "if False:",
            "tests/unit/corpus/test_fetch.py::test_redirect_to_a_private_address_is_refused",
        ),
        (
            "images by URL are bounded in size",
            "if len(content) > self.config.max_bytes:",
            "if False:",
            "tests/unit/corpus/test_fetch.py::test_failure_is_a_result_with_its_reason",
        ),
        (
            "a host gets few requests at a time",
            "        with semaphore:\n",
            "        if True:\n",
            "tests/unit/corpus/test_fetch.py::test_each_url_is_fetched_once_and_hosts_get_few_requests_at_a_time",
        ),
    ),
    *_in(
        "raylava/corpus/row_index.py",
        (
            "a file is scanned once",
            "        self._indexes[file] = self._stored(identity, record)\n        return True\n",
            "        return False\n",
            "tests/unit/corpus/test_source_cache.py::test_unchanged_file_is_scanned_once",
        ),
        (
            "a file that may still change is scanned every time",
            "time.time() - info.mtime_ns / 1e9 < _RECENT_SECONDS",
            "False",
            "tests/unit/corpus/test_source_cache.py::test_file_that_was_just_modified_is_scanned_every_time",
        ),
        (
            "an index that was not completed is not used",
            "        except (FileNotFoundError, NotADirectoryError):\n            return False\n",
            "        except (FileNotFoundError, NotADirectoryError):\n            return True\n",
            "tests/unit/corpus/test_row_index.py::test_index_that_is_not_complete_is_built_again",
        ),
    ),
    *_in(
        "raylava/corpus/source_cache.py",
        (
            "large files are indexed on the cluster",
            "if sum(missing.values()) < CLUSTER_BYTES:",
            "if True:",
            "tests/ray/corpus/test_row_index.py",
        ),
    ),
    *_in(
        "raylava/corpus/json_formats.py",
        (
            "every byte of a JSON list is hashed",
            "        cursor.read_rest()\n",
            "",
            "tests/unit/corpus/test_row_index.py::test_every_byte_of_a_json_file_counts_in_its_hash",
        ),
        (
            "a line belongs to the part in which it begins",
            "offset += len(reader.readline()) - 1",
            "offset += len(reader.readline())",
            "tests/unit/corpus/test_row_index.py",
        ),
    ),
    *_in(
        "raylava/corpus/operators.py",
        (
            "several rows have ids of their own",
            'replace(value, sample_id=f"{row.sample_id}/{number}")',
            "replace(value, sample_id=row.sample_id)",
            f"{OPERATORS}::test_one_row_may_become_several_with_ids_of_their_own",
        ),
        (
            "duplicates are taken out",
            "        if problem is not None:\n            raise problem\n        return [row]",
            "        return [row]",
            f"{OPERATORS}::test_of_duplicates_the_first_in_source_order_stays_whatever_the_shards",
        ),
    ),
    *_in(
        "raylava/corpus/block_writer.py",
        (
            "filtered rows do not count as quarantined",
            "content.filtered += isinstance(bad, FilteredRow)",
            "pass",
            f"{OPERATORS}::test_filtered_rows_are_counted_apart_from_quarantined_ones_and_listed_with_the_operator",
        ),
        (
            "de-duplication sees the rows of the operators before it",
            "crashes, announce, stop=operator)",
            "crashes, announce, stop=0)",
            f"{OPERATORS}::test_operators_apply_in_their_order",
        ),
    ),
    *_in(
        "raylava/corpus/deduplication.py",
        (
            "similar images share one of several bands",
            "edges = np.linspace(0, _HASH_BITS, distance + 2).astype(int)",
            "edges = np.linspace(0, _HASH_BITS, distance + 1).astype(int) if distance else [0, _HASH_BITS]",
            "tests/unit/corpus/test_deduplication.py",
        ),
        (
            "a partition has all rows that share a band",
            "selected |= (mixed",
            "selected = (mixed",
            "tests/unit/corpus/test_deduplication.py",
        ),
    ),
    *_in(
        "raylava/corpus/operator_library.py",
        (
            "images of benchmarks are taken out",
            "if len(benchmarks) and",
            "if False and",
            f"{OPERATORS}::test_images_of_a_benchmark_are_taken_out",
        ),
    ),
    *_in(
        "raylava/pipeline/stages.py",
        (
            "a user's operator is identified by its source",
            'return ({"operator_sources": sources} if sources else {}) |',
            "return",
            "tests/unit/pipeline/test_operators.py",
        ),
    ),
    *_in(
        "raylava/tune/searcher.py",
        (
            "trials wait for capacity",
            "if len(self._running) >= self._concurrency_limit():",
            "if False:",
            "tests/unit/tune/test_searcher.py::test_trials_wait_while_as_many_run_as_the_cluster_can_hold",
        ),
    ),
    *_in(
        "raylava/corpus/shuffle.py",
        (
            "the remainder keeps its order",
            "order[filled:] = np.sort(np.concatenate(list(rest.values())))",
            "order[filled:] = np.concatenate(list(rest.values()))",
            f"{GROUPS}::test_steps_by_modality_are_those_of_llavas_sampler",
        ),
        (
            "epochs differ",
            "np.random.SeedSequence([self.seed, epoch])",
            "np.random.SeedSequence([self.seed, 0])",
            f"{PLAN}::test_each_epoch_has_a_different_order_and_a_short_last_step",
        ),
        (
            "processes of a node share an order",
            "            if not file.exists():\n",
            "            if True:\n",
            "tests/unit/corpus/test_shuffle.py::test_order_is_computed_once_on_a_node_and_anew_for_other_settings",
        ),
    ),
    *_in(
        "raylava/storage.py",
        (
            "remote files are read in large requests",
            "length = max(end - self._position, min(READ_BYTES, self._size - self._position))",
            "length = max(end - self._position, min(1 << 12, self._size - self._position))",
            "tests/ray/corpus/test_requests.py::test_tar_of_200_samples_is_prepared_with_30_gets",
        ),
    ),
    *_in(
        "raylava/train/batch_plan.py",
        (
            "steps hold one modality",
            'lengths.images if training.batching == "by_modality" else None,',
            "None,",
            f"{GROUPS}::test_steps_by_modality_are_those_of_llavas_sampler",
        ),
        (
            "groups have similar lengths",
            "batch if start >= order.remainder else self._grouped(batch)",
            "batch",
            f"{GROUPS}::test_groups_of_a_mixed_batch_have_similar_lengths_or_are_consecutive",
        ),
        (
            "groups have equal shares of the loss",
            "(1.0 / (len(tokens_of_group) * tokens_of_group[group])).tolist()",
            "(np.ones(len(tokens)) / tokens.sum()).tolist()",
            f"{GROUPS}::test_each_weighting_gives_tokens_samples_or_groups_equal_shares",
        ),
        (
            "packs hold several samples",
            "fitting = next((number for number, space in enumerate(free) if space >= length), None)",
            "fitting = None",
            f"{MECHANISMS}::test_packs_hold_several_samples",
        ),
        (
            "ranks are balanced",
            "load, rank = loads[0]",
            "load, rank = 0.0, 0",
            f"{PLAN}::test_ranks_of_a_llava_like_step_are_balanced_to_five_percent",
        ),
        (
            "ranks get equally many packs",
            "return [tuple(pack) for pack in packs] + [()] * (count - len(packs))",
            "return [tuple(pack) for pack in packs]",
            f"{PLAN}::test_any_lengths_are_packed_within_the_token_limit",
        ),
        (
            "samples that fit no pack are refused",
            "if order and lengths_of[order[0]] > max_tokens_per_pack:",
            "if False:",
            f"{PLAN}::test_sample_longer_than_a_pack_is_rejected_with_the_remedy",
        ),
        (
            "max_steps limits a run",
            "return total if self.max_steps is None else min(total, self.max_steps)",
            "return total",
            f"{KEYS}[finetune.max_steps]",
        ),
    ),
    *_in(
        "raylava/train/data_loader.py",
        (
            "positions restart with each sample",
            "np.concatenate([np.arange(len(row.ids)) for row in rows])",
            "np.arange(len(ids))",
            f"{LOADER}::test_positions_restart_with_each_sample_of_a_pack",
        ),
        (
            "packs without images get a blank one",
            "        if not images:\n",
            "        if False:\n",
            f"{LOADER}::test_pack_without_images_gets_a_blank_image_without_loss_tokens",
        ),
        (
            "image tokens are expanded",
            "repeats = np.where(ids == self.image_token_id, self.vision.image_tokens, 1)",
            "repeats = np.ones_like(ids)",
            f"{LOADER}::test_image_tokens_are_expanded_and_target_positions_shifted",
        ),
        (
            "errors of the loader's thread reach training",
            "            batches.put(error)\n",
            "            batches.put(None)\n",
            f"{LOADER}::test_read_error_in_the_background_thread_reaches_the_consumer",
        ),
    ),
    *_in(
        "raylava/train/ray/driver.py",
        (
            "training runs on the nodes of its labels",
            "label_selector=_node_labels(resources, avoided_nodes) or None,",
            "label_selector=None,",
            f"{KEYS}[resources.train_node_labels]",
        ),
        (
            "the number of workers may vary",
            "workers = (resources.min_workers, resources.workers) if resources.min_workers else resources.workers",
            "workers = resources.workers",
            f"{KEYS}[resources.min_workers]",
        ),
        (
            "the cache is bounded",
            '"cache_bytes": 1e9 * resources.cache_gb,',
            '"cache_bytes": 3e11,',
            f"{KEYS}[resources.cache_gb]",
        ),
        (
            "Ray keeps the recipe's number of checkpoints",
            "num_to_keep=config.keep_latest,",
            "num_to_keep=2,",
            f"{KEYS}[finetune.checkpoint.keep_latest]",
        ),
        (
            "a stalled rank is reported",
            "if report.stall and not last_stall:",
            "if False:",
            f"{RAY}::test_stalled_rank_is_named_in_a_warning",
        ),
        (
            "lost workers are reported",
            'logger.warning("%s: lost %s; resuming from the last checkpoint", stage, ", ".join(lost))',
            "pass",
            f"{RAY}::test_lost_workers_are_reported_when_they_are_restarted",
        ),
        (
            "nodes with a broken GPU are avoided",
            "avoided = sorted(broken)",
            "avoided = [next(iter(broken)) * 2]",
            "tests/chaos/train/test_train_failures.py::test_node_whose_gpu_fails_is_avoided_and_the_samples_stay_the_same",
        ),
    ),
    *_in(
        "raylava/train/ray/monitor.py",
        (
            "a rank that waits for data for long counts as stalled",
            "if not heartbeats or any(now - heartbeat.time < timeout_s for heartbeat in heartbeats):",
            "if True:",
            "tests/unit/train/test_ray_backend.py::test_rank_that_is_furthest_behind_is_the_stalled_one",
        ),
    ),
    *_in(
        "raylava/train/ray/failures.py",
        (
            "a worker's own error ends the run",
            "        if recorded and not lost:\n            raise RunError(recorded)\n",
            "",
            f"{RAY}::test_error_of_one_worker_ends_the_run_at_once_with_that_worker_as_the_cause",
        ),
        (
            "failures without progress are limited",
            "self._failures, self._preempted = self._failures + 1, []",
            "self._preempted = []",
            f"{RAY}::test_policy_ends_the_run_after_its_number_of_failures_and_does_not_count_preemptions",
        ),
        (
            "a checkpoint resets the count of failures",
            "        if checkpoint is not None:\n            self._failures = 0\n",
            "        return\n",
            f"{RAY}::test_run_that_saves_checkpoints_may_lose_workers_any_number_of_times",
        ),
        (
            "a vanished peer is distinguished from an error",
            "return is_collective and any(message in text for message in _PEER_DISCONNECTED)",
            "return False",
            "tests/unit/train/test_ray_backend.py::test_collective_that_lost_its_peer_is_a_peer_failure",
        ),
    ),
    *_in(
        "raylava/train/torchrun_backend.py",
        (
            "the best checkpoints are kept",
            "    if not config.keep_best:\n",
            "    if True:\n",
            "tests/unit/train/test_torchrun_backend.py",
        ),
    ),
    *_in(
        "raylava/train/metrics.py",
        (
            "MFU is measured on known GPUs",
            "mfu=self._peak and flops / duration / self._peak,",
            "mfu=None,",
            "tests/unit/train/test_metrics.py",
        ),
        (
            "MLflow gets the metrics",
            "        trackers.append(MLflow(tracking.mlflow, run, settings))\n",
            "        pass\n",
            f"{KEYS}[tracking.mlflow]",
        ),
    ),
    *_in(
        "raylava/train/sampled_steps.py",
        (
            "the cost of dense attention is counted",
            "        if self.model.dense_attention:\n",
            "        if False:\n",
            "tests/unit/train/test_sampled_steps.py::test_dense_attention_executes_all_pairs_of_a_pack",
        ),
    ),
    *_in(
        "raylava/perf/memory.py",
        (
            "the masks of dense attention are counted",
            "        return repeated + pairs * value\n",
            "        return repeated\n",
            "tests/unit/perf/test_memory.py",
        ),
        (
            "the mask belongs to the peak",
            "        attention_mask,\n        saved_activations,\n        backward_temporaries,\n",
            "        saved_activations,\n        backward_temporaries,\n",
            "tests/unit/perf/test_memory.py::test_peak_memory_includes_the_mask_of_dense_attention",
        ),
    ),
    *_in(
        "raylava/perf/search.py",
        (
            "auto takes what fits",
            "return fastest_feasible(candidates) or fastest or min(",
            "return min(",
            "tests/unit/perf/test_search.py",
        ),
    ),
    *_in(
        "raylava/models/llava.py",
        (
            "attention is set after assembly",
            "    set_attn_implementation(llava, attn_implementation)\n    if connector",
            "    if connector",
            f"{LLAVA}::test_language_model_computes_attention_by_the_implementation_that_is_asked_for",
        ),
        (
            "varlen knows the samples",
            "**(starts if self._varlen else {}),",
            "",
            f"{LLAVA}::test_packed_logits_equal_the_logits_of_each_sample_alone",
        ),
        (
            "the connector's initialization depends on the seed",
            "torch.manual_seed(seed)",
            "torch.manual_seed(0)",
            f"{LLAVA}::test_connector_initialization_depends_only_on_its_seed",
        ),
        (
            "pretraining freezes the language model",
            'trainable = stage == "finetune"',
            "trainable = True",
            f"{LLAVA}::test_pretraining_trains_the_connector_and_finetuning_also_the_language_model",
        ),
        (
            "a given connector is loaded",
            "        load_connector(llava, model.connector_weights)\n",
            "        pass\n",
            f"{LLAVA}::test_connector_of_the_right_widths_replaces_random_initialization",
        ),
        (
            "logits are computed at loss tokens",
            "return hidden[0, pack.target_positions]",
            "return hidden[0]",
            f"{LLAVA}::test_loss_from_logits_at_target_positions_equals_the_loss_from_the_logits_of_transformers",
        ),
        (
            "added embedding rows are left out of the softmax",
            "loss_weights, self._vocabulary)",
            "loss_weights, self.llava.lm_head.weight.shape[0])",
            f"{LLAVA}::test_added_embedding_rows_take_no_part_in_the_softmax",
        ),
        (
            "image features have the scale of embeddings",
            "else output * self.feature_factor",
            "else output",
            f"{CONNECTOR}::test_first_layer_receives_scaled_image_features_beside_scaled_token_embeddings",
        ),
        (
            "training starts from a checkpoint in its own convention",
            "scale_last_layer(connector, 1.0 / factor)",
            "scale_last_layer(connector, 1.0)",
            "tests/unit/models/test_checkpoint.py::test_training_starts_from_a_legacy_checkpoint_as_it_was_trained",
        ),
    ),
    *_in(
        "raylava/models/attention.py",
        (
            "attention on a GPU is one call of the kernel",
            "if has_varlen_kernel(query.device, query.dtype, query.shape[-1]):",
            "if False:",
            f"{ATTENTION}::test_decoder_layer_on_a_gpu_calls_the_kernel_once",
        ),
        (
            "the kernel's attention is causal",
            '"window_size": (-1, 0)',
            '"window_size": (-1, -1)',
            f"{ATTENTION}::test_arguments_of_the_kernel_describe_the_attention_of_the_loop",
        ),
        (
            "heads are expanded for a kernel without grouped heads",
            "key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))",
            "pass",
            f"{ATTENTION}::test_arguments_of_the_kernel_describe_the_attention_of_the_loop",
        ),
    ),
    *_in(
        "raylava/models/loss.py",
        (
            "loss tokens carry their weights",
            "loss += (losses * loss_weights[rows]).sum()",
            "loss += losses.sum()",
            f"{LLAVA}::test_each_loss_token_counts_by_its_weight",
        ),
        (
            "gradients carry the weights of loss tokens",
            "values.mul_(loss_weights[:, None])",
            "values",
            f"{LOSS}::test_loss_and_gradients_equal_those_of_the_whole_logits",
        ),
        (
            "logits are computed in chunks",
            "size = loss_chunk_rows(vocabulary)",
            "size = len(hidden)",
            f"{LOSS}::test_no_tensor_has_the_size_of_all_logits",
        ),
    ),
    *_in(
        "raylava/models/connector.py",
        (
            "a connector brings its vision tower",
            "        if part or prefix == CONNECTOR:\n",
            "        if prefix == CONNECTOR:\n",
            f"{LLAVA}::test_connector_trained_together_with_the_vision_tower_brings_the_tower",
        ),
        (
            "the scale is rounded to the compute dtype",
            "return float(torch.tensor(scale).to(dtype))",
            "return scale",
            f"{CONNECTOR}::test_factor_is_rounded_to_the_compute_dtype",
        ),
        (
            "a connector of the other convention is converted",
            "connector_factor(file) / running_feature_factor(llava)",
            "1.0",
            f"{CONNECTOR}::test_connector_trained_in_one_convention_gives_the_same_features_in_the_other",
        ),
    ),
    *_in(
        "raylava/models/export.py",
        (
            "the scale is folded into the exported connector",
            "scaled = scale_last_layer(own if weights is None else weights, running_feature_factor(llava))",
            "scaled = scale_last_layer(own if weights is None else weights, 1.0)",
            f"{CONNECTOR}::test_exported_model_computes_the_logits_of_training",
        ),
        (
            "exported weights have published names",
            "prefix = VISION_TOWER + model.vision.hub_prefix",
            "prefix = VISION_TOWER",
            "tests/unit/models/test_export_names.py",
        ),
        (
            "exported files hold no paths",
            '        part.name_or_path = ""\n',
            "        pass\n",
            "tests/unit/models/test_export.py::test_no_exported_file_holds_a_path_of_this_machine",
        ),
    ),
    *_in(
        "raylava/models/checkpoint.py",
        (
            "legacy checkpoints are converted",
            "return scale if _saved_version(checkpoint, config) < Version(MIN_TRANSFORMERS) else 1.0",
            "return 1.0",
            "tests/unit/models/test_checkpoint.py::test_legacy_checkpoint_computes_what_it_was_trained_to",
        ),
        (
            "checkpoints that lack weights are refused",
            'loading["missing_keys"],',
            "[],",
            "tests/unit/models/test_checkpoint.py::test_checkpoint_that_lacks_weights_is_refused",
        ),
    ),
    *_in(
        "raylava/models/hub.py",
        (
            "workers load the commit of the fingerprint",
            "return revision if is_folder(name) else _hub_commit(name, revision)",
            "return revision",
            "tests/unit/models/test_hub.py::test_workers_load_the_commit_that_entered_the_fingerprint",
        ),
        (
            "pickle files are not unpickled",
            "weights_only=True",
            "weights_only=False",
            "tests/unit/models/test_hub.py::test_pickle_that_holds_code_is_refused_and_not_run",
        ),
        (
            "converted weights are verified",
            "        if storage_path(target / file).sha256() != expected:\n",
            "        if False:\n",
            "tests/unit/models/test_hub.py::test_converted_weights_that_changed_are_refused",
        ),
    ),
    *_in(
        "raylava/models/attention.py",
        (
            "varlen refuses what it does not compute",
            "    if in_force:\n",
            "    if False:\n",
            "tests/unit/models/test_attention.py",
        ),
        ("varlen is causal", "is_causal=True, scale=scaling", "is_causal=False, scale=scaling", f"{LLAVA}"),
    ),
    *_in(
        "raylava/pipeline/graph.py",
        ("the recipe's seed is used", "            seed=recipe.seed,\n", "            seed=0,\n", f"{KEYS}[seed]"),
        (
            "the recipe's trackers are used",
            "            tracking=recipe.tracking,\n",
            "",
            f"{KEYS}[tracking.wandb]",
        ),
        (
            "pretraining can be left out",
            "        if recipe.pretrain.enabled:\n",
            "        if recipe.corpora.alignment is not None:\n",
            f"{KEYS}[pretrain.enabled]",
        ),
        (
            "each training stage has its settings",
            'training=recipe.pretrain if stage == "pretrain" else recipe.finetune,',
            "training=recipe.finetune,",
            "tests/ray/config/test_every_key.py::test_each_stage_gets_its_own_section",
        ),
    ),
    *_in(
        "raylava/pipeline/stages.py",
        (
            "preparing runs on the nodes of its labels",
            "node_labels = node_labels_for(PREPARE, self._resources)",
            "node_labels: dict[str, str] = {}",
            f"{KEYS}[resources.prepare_node_labels]",
        ),
    ),
    *_in(
        "raylava/pipeline/evaluation.py",
        (
            "answers have the benchmark's length",
            "return self.benchmark.max_new_tokens or self.loaded.max_new_tokens",
            "return 32",
            f"{KEYS}[evaluate.max_new_tokens]",
        ),
        (
            "the prompt's suffix is used",
            "prompt_suffix=self.benchmark.prompt_suffix,",
            'prompt_suffix="",',
            f"{KEYS}[evaluate.prompt_suffix]",
        ),
    ),
    *_in(
        "raylava/evaluation/generation.py",
        (
            "questions are answered in batches",
            "batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]",
            "batches = [[question] for question in by_length]",
            "tests/ray/evaluation/test_generation.py::test_questions_are_answered_in_batches_on_the_nodes_of_the_role",
        ),
        (
            "evaluation runs on the nodes of its labels",
            "label_selector=dict(actors.node_labels) or None,",
            "label_selector=None,",
            "tests/ray/evaluation/test_generation.py::test_questions_are_answered_in_batches_on_the_nodes_of_the_role",
        ),
        (
            "stored answers are reused",
            "unanswered = [question for question in questions if question.question_id not in answers]",
            "unanswered = questions",
            "tests/ray/evaluation/test_generation.py::test_interrupted_evaluation_answers_only_the_missing_questions",
        ),
    ),
    *_in(
        "raylava/evaluation/endpoint_generation.py",
        (
            "an endpoint's open requests are bounded",
            "for _ in range(min(self._source.concurrency, count)):",
            "for _ in range(count):",
            f"{ENDPOINTS}::test_as_many_requests_are_open_as_the_concurrency_allows",
        ),
    ),
    *_in(
        "raylava/evaluation/endpoints.py",
        (
            "no message quotes the key of an endpoint",
            'content = content.replace(self._key.encode(), b"[key]")',
            "pass",
            f"{ENDPOINTS}::test_key_is_sent_as_a_bearer_token_and_quoted_in_no_message",
        ),
        (
            "endpoints see the exact pixels",
            'image.save(buffer, "PNG", compress_level=1)',
            'image.quantize(4).save(buffer, "PNG")',
            f"{ENDPOINTS}::test_request_holds_the_pixels_of_the_image_and_the_conversation_before_the_question",
        ),
    ),
    *_in(
        "raylava/evaluation/questions.py",
        (
            "rows are limited",
            "questions = questions[: benchmark.max_rows]",
            "pass",
            f"{KEYS}[evaluate.max_rows]",
        ),
        (
            "equal ids are refused",
            "    _check_ids(questions, file)\n",
            "",
            "tests/unit/evaluation/test_questions.py",
        ),
    ),
    *_in(
        "raylava/evaluation/metrics/exact_match.py",
        (
            "answers are normalized",
            'return text.strip().rstrip(".").strip().lower()',
            "return text",
            "tests/unit/evaluation/metrics",
        ),
    ),
    *_in(
        "raylava/evaluation/metrics/vqa_accuracy.py",
        (
            "VQA accuracy needs three matches",
            "min(1.0, (sum(matches) - left_out) / 3)",
            "min(1.0, (sum(matches) - left_out) / 1)",
            "tests/unit/evaluation/metrics",
        ),
    ),
    *_in(
        "raylava/corpus/prepare.py",
        (
            "too many quarantined rows end preparing",
            "if quarantined > corpus.quarantine_limit * rows_in:",
            "if False:",
            f"{PREPARE}::test_more_quarantined_rows_than_the_limit_raise_user_error",
        ),
        (
            "no row is lost in silence",
            'assert manifest.rows + reasons.total() == rows_in + manifest.added, "a source row was lost"',
            "pass",
            f"{PREPARE}::test_corpus_that_lost_a_row_is_never_published",
        ),
    ),
    *_in(
        "raylava/corpus/parallel.py",
        (
            "blocks are made on the nodes of the role",
            "compute=pool, label_selector=node_labels or None",
            "compute=pool, label_selector=None",
            "tests/ray/corpus/test_prepare.py::test_blocks_are_made_on_the_nodes_of_the_role",
        ),
    ),
    *_in(
        "raylava/corpus/shards.py",
        (
            "an empty selection is refused",
            "    if not rows:\n",
            "    if False:\n",
            f"{PREPARE}::test_selecting_no_row_raises_user_error",
        ),
    ),
    *_in(
        "raylava/corpus/images.py",
        (
            "images are padded or cropped as the recipe says",
            '    if aspect == "pad":\n        return _center_crop(resize(_pad(',
            "    if True:\n        return _center_crop(resize(_pad(",
            f"{KEYS}[corpora.instruction.image_aspect]",
        ),
        (
            "JPEG has the recipe's quality",
            "quality=encoding.quality",
            "quality=95",
            f"{KEYS}[corpora.instruction.image_encoding.quality]",
        ),
        (
            "extreme images are quarantined",
            "    if intermediate > max_pixels:\n",
            "    if False:\n",
            "tests/unit/corpus/test_images.py::test_extreme_aspect_ratio_is_rejected",
        ),
    ),
    *_in(
        "raylava/corpus/rows.py",
        (
            "image paths stay below their root",
            'if name.startswith(("/", "~")) or "://" in name or ".." in parts or "\\0" in name:',
            "if False:",
            "tests/unit/corpus/test_sources.py::test_image_path_cannot_escape_its_root",
        ),
        (
            "rows are excluded",
            "return included and not any(fnmatch(name, pattern) for name in names for pattern in exclude)",
            "return included",
            f"{KEYS}[corpora.instruction.sources.exclude]",
        ),
    ),
    *_in(
        "raylava/corpus/sources.py",
        (
            "sources are limited",
            "itertools.islice(self.matching_rows(indexes), self.source.max_rows)",
            "self.matching_rows(indexes)",
            f"{KEYS}[corpora.instruction.sources.max_rows]",
        ),
        (
            "sources are weighted",
            "_copies(self.source.sampling_weight,",
            "_copies(1.0,",
            f"{KEYS}[corpora.instruction.sources.sampling_weight]",
        ),
    ),
    *_in(
        "raylava/corpus/conversation.py",
        (
            "the loss covers answers only",
            "loss_spans.append((start, len(ids)))",
            "loss_spans.append((1, len(ids)))",
            "tests/unit/corpus/test_conversation.py",
        ),
        (
            "control tokens in a text stay text",
            "split_special_tokens=True",
            "split_special_tokens=False",
            "tests/unit/corpus/test_conversation.py",
        ),
    ),
    *_in(
        "raylava/tune/prefixes.py",
        (
            "a longer variant continues from a shorter one",
            "prefix = shorter[length].as_prefix(prefix)",
            "prefix = None",
            "tests/unit/tune/test_prefixes.py",
        ),
        (
            "a shorter variant keeps its state",
            "keep_state=stage.spec().fingerprint in extended",
            "keep_state=False",
            "tests/unit/tune/test_prefixes.py",
        ),
    ),
    *_in(
        "raylava/pipeline/stages.py",
        (
            "steps that depend on the length are not shared",
            'if training.lr_schedule != "constant" or training.warmup_ratio or training.checkpoint.keep_best:',
            "if False:",
            "tests/unit/tune/test_prefixes.py",
        ),
    ),
    *_in(
        "raylava/tune/early_stopping.py",
        (
            "unpromising trials are stopped",
            "return decision == TrialScheduler.STOP and result[_TIME] < RUNGS",
            "return False",
            "tests/unit/tune/test_early_stopping.py",
        ),
        (
            "losses of earlier drivers count",
            "_create_scheduler(self._config, source.finished_losses())",
            "_create_scheduler(self._config, [])",
            "tests/unit/tune/test_early_stopping.py",
        ),
        (
            "variants are not compared",
            "self._schedulers[source.variant.name] =",
            "scheduler = self._schedulers[source.variant.name] = next(iter(self._schedulers.values()), None) or",
            "tests/unit/tune/test_early_stopping.py",
        ),
    ),
    *_in(
        "raylava/tune/budget.py",
        (
            "a search ends when its money is spent",
            "return self._max_cost is not None and self._cost() >= self._max_cost",
            "return False",
            "tests/unit/tune/test_budget.py",
        ),
        (
            "stages that trials share cost once",
            "self._hours[path.uri] =",
            "self._hours[f'{path.uri}{record.number}'] =",
            "tests/unit/tune/test_budget.py",
        ),
    ),
    *_in(
        "raylava/tune/study.py",
        (
            "the search uses TPE",
            '    if search.sampler == "random":\n',
            "    if True:\n",
            f"{STUDY}::test_search_uses_the_sampler_that_it_names",
        ),
        (
            "a search is not mixed with another",
            "            self._check_owner(storage, name, variant)\n            studies.append",
            "            studies.append",
            f"{STUDY}::test_study_of_other_data_is_refused",
        ),
        (
            "interrupted trials continue",
            "        return [trial for trial in running if trial.params.keys() == self.search.space.keys()]\n",
            "        return []\n",
            f"{STUDY}::test_trial_interrupted_with_its_driver_resumes_with_the_same_settings",
        ),
    ),
    *_in(
        "raylava/tune/variants.py",
        (
            "combinations are excluded",
            "        if not any(excluded.items() <= combination.items() for excluded in sweep.exclude):\n",
            "        if True:\n",
            "tests/unit/tune/test_variants.py",
        ),
        (
            "variants have their seed",
            '        settings["seed"] = seed\n',
            "        pass\n",
            "tests/unit/tune/test_variants.py",
        ),
    ),
    *_in(
        "raylava/storage.py",
        (
            "retries back off",
            "wait = min(2 * wait, _MAX_BACKOFF_S)",
            "pass",
            "tests/unit/test_storage.py::test_retry_backs_off_exponentially_and_raises_the_last_error",
        ),
    ),
    *_in(
        "raylava/artifacts.py",
        (
            "the format version is part of fingerprints",
            '"stage": stage, "format"',
            '"format"',
            "tests/unit/test_artifacts.py::test_stage_is_part_of_the_fingerprint",
        ),
        (
            "locks of dead holders are taken over",
            'return time.time() - holder["heartbeat"] > LOCK_TIMEOUT_S',
            "return False",
            "tests/unit/test_artifacts.py::test_lock_of_another_host_is_abandoned_once_its_heartbeat_is_too_old",
        ),
    ),
    *_in(
        "raylava/cluster/session.py",
        (
            "a command's cluster listens on the loopback interface",
            'dashboard_host="127.0.0.1",',
            'dashboard_host="0.0.0.0",',
            "tests/ray/cluster/test_session.py::test_cluster_of_a_command_listens_on_the_loopback_interface",
        ),
        (
            "a joined cluster's settings are left alone",
            '        os.environ.setdefault(_TRACK_TRAINING, "1")\n        return\n',
            '        os.environ.setdefault(_TRACK_TRAINING, "1")\n',
            "tests/ray/cluster/test_session.py::test_settings_of_a_cluster_that_is_joined_are_left_alone",
        ),
    ),
    *_in(
        "raylava/cluster/jobs.py",
        (
            "jobs contain no secret",
            "        check_no_secret(spec)\n",
            "",
            "tests/unit/cluster/test_jobs.py",
        ),
    ),
    *_in(
        "raylava/config/recipe.py",
        (
            "DeepSpeed settings that change a result are fingerprinted",
            'optional = {"deepspeed": deepspeed | quantized, "keep_best"',
            'optional = {"keep_best"',
            "tests/unit/config/test_recipe.py::test_setting_that_determines_the_result_is_fingerprinted",
        ),
        (
            "settings that raylava makes are refused",
            "    if reserved:\n",
            "    if False:\n",
            "tests/unit/config/test_recipe.py::test_wrong_setting_is_reported_in_one_line_with_the_fix",
        ),
        (
            "a quality without JPEG is refused",
            '        if self.format != "jpeg" and self.quality',
            "        if False and self.quality",
            "tests/unit/config/test_recipe.py::test_wrong_setting_is_reported_in_one_line_with_the_fix",
        ),
    ),
    *_in(
        "raylava/cluster/preemption.py",
        (
            "a notice drains every node of its machine",
            'return [node["NodeID"] for node in nodes if node["NodeManagerAddress"] == machine]',
            "return [connected]",
            "tests/ray/cluster/test_preemption.py",
        ),
    ),
    *_in(
        "raylava/compat/deepspeed.py",
        (
            "frozen weights are not in checkpoints",
            "{name: value for name, value in weights if name in self._trained}",
            "dict(weights)",
            "tests/unit/compat/test_deepspeed.py::test_checkpoints_are_written_in_the_background_without_frozen_weights",
        ),
    ),
    *_in(
        "raylava/artifacts.py",
        (
            "hashes are computed before the upload",
            "    hashes = folder_sha256(folder)\n    target.upload_folder(folder)\n",
            "    target.upload_folder(folder)\n    hashes = folder_sha256(Path(target.path))\n",
            "tests/unit/test_artifacts.py::test_hashes_are_those_of_the_files_before_they_were_uploaded",
        ),
        (
            "verify finds damaged files",
            "return None if file.sha256() == expected else",
            "return None if file.sha256() else",
            "tests/unit/test_artifacts.py::test_verify_names_damaged_and_missing_files",
        ),
    ),
    *_in(
        "raylava/storage.py",
        (
            "an uploaded folder is on disk",
            '            for entry in folder.rglob("*"):\n',
            "            for entry in ():\n",
            "tests/unit/test_artifacts.py::test_content_is_on_disk_before_the_record_that_completes_it",
        ),
        (
            "links that loop are followed once",
            "and (status.st_dev, status.st_ino) not in parents:",
            "and len(parents) < 9:",
            "tests/unit/test_storage.py::test_listing_leaves_out_what_no_row_can_name_and_follows_looping_links_once",
        ),
    ),
    *_in(
        "raylava/corpus/crashes.py",
        (
            "a crash is searched for after two deaths",
            "_DEATHS_BEFORE_SEARCH = 2",
            "_DEATHS_BEFORE_SEARCH = 9",
            "tests/unit/corpus/test_crashes.py::test_every_deadly_row_is_found_after_the_second_death",
        ),
        (
            "an exception is no death",
            "        _write_attempts(file, task, begun, crashes)  # the process lives",
            "        pass  # the process lives",
            "tests/unit/corpus/test_crashes.py::test_exception_in_an_attempt_is_no_death",
        ),
        (
            "attempts end at some time",
            "if begun >= _MAX_DEATHS:",
            "if False:",
            "tests/unit/corpus/test_crashes.py::test_attempts_that_keep_dying_without_a_deadly_row_end_the_run",
        ),
    ),
    *_in(
        "raylava/corpus/binary_formats.py",
        (
            "Parquet reads its own columns only",
            "if name in ROW_FIELDS]",
            "if name]",
            "tests/unit/corpus/test_formats.py::test_parquet_reads_its_own_columns_in_batches",
        ),
    ),
    *_in(
        "raylava/corpus/json_formats.py",
        (
            "a wrong comma ends the scan at once",
            "if self._may_be_incomplete(error) and self._read_chunk():",
            "if self._read_chunk():",
            "tests/unit/corpus/test_formats.py::test_wrong_comma_is_reported_without_reading_the_rest",
        ),
    ),
    *_in(
        "raylava/models/checkpoint.py",
        (
            "weights of other shapes are refused",
            'key for key, *_ in loading["mismatched_keys"]',
            "key for key, *_ in ()",
            "tests/unit/models/test_checkpoint.py",
        ),
        (
            "weights without a place are refused",
            'for key in loading["unexpected_keys"]',
            "for key in ()",
            "tests/unit/models/test_checkpoint.py",
        ),
    ),
    *_in(
        "raylava/pipeline/evaluation.py",
        (
            "an edited artifact is another model",
            "    return found != expected\n",
            "    return False\n",
            "tests/unit/pipeline/test_model_ref.py::test_artifact_is_identified_by_its_fingerprint_until_one_of_its_files_is_edited",
        ),
        (
            "tokenizer and templates identify a model",
            '        fields["behavior"] = behavior\n',
            "        pass\n",
            "tests/unit/pipeline/test_model_ref.py",
        ),
    ),
    *_in(
        "raylava/local_copies.py",
        (
            "a damaged copy is downloaded again",
            "    if content == json.loads(hashes.read_text()):\n",
            "    if content:\n",
            "tests/ray/test_storage_s3.py::test_copy_that_was_damaged_on_disk_is_downloaded_again_by_another_process",
        ),
        (
            "a copy is that of the current content",
            "json.dumps([path.uri, versions])",
            "json.dumps([path.uri])",
            "tests/ray/test_storage_s3.py::test_copy_of_a_bucket_is_kept_until_an_object_changes",
        ),
    ),
    *_in(
        "raylava/corpus/block_cache.py",
        (
            "a damaged block is downloaded again",
            "if storage_path(target).sha256() != record.sha256:",
            "if False:",
            "tests/ray/corpus/test_block_cache.py::test_cached_block_that_was_damaged_on_disk_is_downloaded_again",
        ),
    ),
    *_in(
        "raylava/evaluation/answer_files.py",
        (
            "what the model said is scored, not the label",
            '    ("answer", "response"): "response",\n',
            '    ("answer", "response"): "answer",\n',
            "tests/unit/evaluation/test_answer_files.py",
        ),
    ),
    *_in(
        "raylava/console.py",
        (
            "control codes of data have no effect",
            "return markup.escape(printable(text))",
            "return markup.escape(text)",
            "tests/unit/test_console.py::test_control_codes_and_markup_in_data_are_printed_as_they_are",
        ),
        (
            "logs hold no secrets of URLs",
            "return redact_urls(super().format(record))",
            "return super().format(record)",
            "tests/unit/test_console.py::test_secrets_in_urls_stay_out_of_the_terminal_and_the_log_with_its_traceback",
        ),
    ),
    *_in(
        "raylava/pages/render.py",
        ("text on pages is escaped", "autoescape=True,", "autoescape=False,", "tests/unit/pages/test_pages.py"),
        (
            "a page allows its own script only",
            "f\"img-src data:; script-src '{_sha256(content)}'\"",
            "\"img-src data:; script-src 'unsafe-inline'\"",
            "tests/unit/pages/test_pages.py::test_inline_script_is_the_one_that_the_policy_allows",
        ),
    ),
    *_in(
        "raylava/pipeline/run_report/data.py",
        (
            "a report has no secrets",
            "return _redact(data)",
            "return data",
            f"{PAGES}::test_secrets_in_urls_are_on_no_page",
        ),
    ),
    *_in(
        "raylava/pipeline/run_report/page.py",
        (
            "a report that cannot be written does not fail the run",
            "except Exception as error:  # the run",
            "except ZeroDivisionError as error:  # the run",
            f"{PAGES}::test_report_that_cannot_be_written_is_a_warning",
        ),
    ),
    *_in(
        "raylava/api/runs.py",
        (
            "overrides are not dropped for a loaded recipe",
            "    if overrides:",
            "    if False:",
            "tests/unit/api/test_api.py::test_overrides_apply_to_a_file_or_name_and_not_to_a_loaded_recipe",
        ),
    ),
    *_in(
        "raylava/compat/deepspeed.py",
        (
            "collectives do not fill the logs with warnings",
            'is deprecated", FutureWarning)',
            'is deprecated", ImportWarning)',
            "tests/unit/compat/test_deepspeed.py::test_collectives_of_deepspeed_do_not_fill_the_logs_with_deprecation_warnings",
        ),
    ),
    *_in(
        "raylava/toy/scenes.py",
        (
            "things of a scene differ",
            "things = rng.choice(THINGS, size=count, replace=False)",
            "things = rng.choice(THINGS, size=count)",
            "tests/unit/toy/test_scenes.py::test_things_and_colors_of_a_scene_differ_so_that_questions_have_one_answer",
        ),
    ),
]
