"""Every mistake of a user ends in one line that names the file, key or option, and in status 2, before any stage.

Each entry of the table is a command line, and below it how its error begins. The files that the commands name are those
of tests/support/damaged_files.py.
"""

import os
import shlex
from pathlib import Path

import pytest

from raylava.artifacts import Artifact
from raylava.cli import main
from tests.support.damaged_files import write_damaged_files

TABLE = """
check nowhere.yaml
    nowhere.yaml: cannot read the recipe
check folder.yaml
    folder.yaml: cannot read the recipe
check file
    file: a recipe is a mapping of keys to values, this is a NoneType
check empty.yaml
    empty.yaml: a recipe is a mapping of keys to values, this is a NoneType
check list.yaml
    list.yaml: a recipe is a mapping of keys to values, this is a list
check text.yaml
    text.yaml: a recipe is a mapping of keys to values, this is a str
check tabs.yaml
    tabs.yaml: not valid YAML: while scanning for the next token found character
check twice.yaml
    twice.yaml: not valid YAML: the key 'name' occurs twice; remove one in
check nested-twice.yaml
    nested-twice.yaml: not valid YAML: the key 'lr' occurs twice; remove one in
check alias.yaml
    alias.yaml: name is missing; add it to the file or give name=… (and 3 more)
check bomb.yaml
    bomb.yaml: unknown key 'a'; choose one of: name, data, seed, model, corpora,
check tag.yaml
    tag.yaml: not valid YAML: could not determine a constructor for the tag
check digits.yaml
    digits.yaml: not valid YAML: Exceeds the limit (4300 digits) for integer
check deep.yaml
    deep.yaml: not valid YAML: maximum recursion depth exceeded
check nowhere
    nowhere: neither a file nor a shipped recipe; `raylava recipes` lists the
run lava-gemma-2b
    lava-gemma-2b: neither a file nor a shipped recipe; did you mean
sweep toy-ablation
    toy-ablation: neither a file nor a shipped recipe; did you mean toy-ablations
check parent-name.yaml
    nowhere: neither a file nor a shipped recipe; `raylava recipes` lists the
check ''
    .: cannot read the recipe
recipes show toi
    toi: no shipped recipe has this name; did you mean toy?
recipes copy nowhere mine.yaml
    nowhere: no shipped recipe has this name; `raylava recipes` lists the
recipes copy toy recipe.yaml
    recipe.yaml: exists already; name a new file
recipes copy toy nowhere/at/all.yaml
    nowhere/at/all.yaml: cannot be written (No such file or directory); name
recipes copy toy
    Missing argument 'FILE'.; see `raylava recipes copy --help`
recipes toy
    No such command 'toy'.; see `raylava recipes --help`
show ~nosuchuser/x
    '~nosuchuser/x' is no path
status --storage ~nosuchuser/x
    '~nosuchuser/x' is no path
chat a/b/c hello
    a/b/c@main: the hub cannot be reached and no copy is cached; use a folder
toy nowhere/at/all
    nowhere/at/all: the folder that it would be in does not exist; create it first
toy
    Missing argument 'FOLDER'
run recipe.yaml 'data="a\\0b"'
    'a\\x00b' has a null character
check recipe.yaml corpora.instruction.sources.0.include=[]
    recipe.yaml: corpora.instruction.sources.0.include=[]: Tuple should have at
check recipe.yaml finetune.epochs=99999999999999999999
    recipe.yaml: finetune.epochs=99999999999999999999: Input should be less than
check self.yaml
    self.yaml: extends itself through self.yaml; remove one `extends:`
check parent-number.yaml
    parent-number.yaml: extends=3 is not the path of a recipe; name one, or
check parent-list.yaml
    parent-list.yaml: extends=['a', 'b'] is not the path of a recipe; name one,
check parent-missing.yaml
    nowhere.yaml: cannot read the recipe
check number-key.yaml
    number-key.yaml: 1=1: Keys should be strings
check null-key.yaml
    null-key.yaml: None=None: Keys should be strings
check section-number.yaml
    section-number.yaml: finetune=3: Input should be a valid dictionary or
check section-list.yaml
    section-list.yaml: model=[1]: Input should be a valid dictionary or instance
check date.yaml
    date.yaml: name=datetime.date(2026, 1, 1): Input should be a valid string
check latin.yaml
    latin.yaml: not valid YAML: 'utf-8' codec can't decode byte 0xe9 in position
check binary.yaml
    binary.yaml: not valid YAML: 'utf-8' codec can't decode byte 0x80 in position
check utf16.yaml
    utf16.yaml: not valid YAML: 'utf-8' codec can't decode byte 0xff in position
check /dev/null
    /dev/null: a recipe is a mapping of keys to values, this is a NoneType
check recipe.yaml seed
    'seed' is not an override; write key=value, for example finetune.lr=1e-5
check recipe.yaml =3
    '=3' is not an override; write key=value, for example finetune.lr=1e-5
check recipe.yaml seed=[
    'seed=[': the value is not valid YAML: while parsing a flow node expected the
check recipe.yaml seed=-1
    recipe.yaml: seed=-1: Input should be greater than or equal to 0
check recipe.yaml seed=2**70
    recipe.yaml: seed='2**70': Input should be a valid integer, unable to parse
check recipe.yaml seed=1180591620717411303424
    recipe.yaml: seed=1180591620717411303424: Input should be less than or equal
check recipe.yaml seed=1.5
    recipe.yaml: seed=1.5: Input should be a valid integer, got a number with a
check recipe.yaml seed=yes
    recipe.yaml: seed=True: is true or false; give a number
check recipe.yaml seed=
    recipe.yaml: seed=None: Input should be a valid integer
check recipe.yaml seed.a=1
    recipe.yaml: seed: Input should be a valid integer
check recipe.yaml a.b.c=1
    recipe.yaml: unknown key 'a'; choose one of: name, data, seed, model,
check recipe.yaml .=1
    recipe.yaml: unknown key ''; choose one of: name, data, seed, model, corpora,
check recipe.yaml finetune..lr=1
    recipe.yaml: unknown key 'finetune.'; did you mean 'finetune'?
check recipe.yaml evaluate.0=1
    recipe.yaml: evaluate.0=1: Input should be a valid dictionary or instance of
check recipe.yaml evaluate.7.name=x
    evaluate.7: '7' is not an index into a list of 1; indices start at 0
check recipe.yaml evaluate.-1.name=x
    evaluate.-1: '-1' is not an index into a list of 1; indices start at 0
check recipe.yaml evaluate.x.name=x
    evaluate.x: 'x' is not an index into a list of 1; indices start at 0
check recipe.yaml evaluate=3
    recipe.yaml: evaluate=3: Input should be a valid tuple
check recipe.yaml evaluate.0.name=a/b
    recipe.yaml: evaluate.0.name='a/b': String should match pattern
check recipe.yaml evaluate.0.name=..
    recipe.yaml: evaluate.0.name='..': String should match pattern
check recipe.yaml evaluate.0.name=
    recipe.yaml: evaluate.0.name=None: Input should be a valid string
check recipe.yaml evaluate.0.benchmark=nonsense
    nonsense: unknown benchmark; choose one of: pope, gqa, vqav2, mme, mmvp,
check recipe.yaml evaluate.0.protocol=nonsense
    protocol nonsense: unknown for custom; choose one of: gqa
check recipe.yaml evaluate.0.metric=nonsense
    recipe.yaml: evaluate.0.metric='nonsense': Input should be 'exact_match',
check recipe.yaml "evaluate.0.categories={a: '('}"
    recipe.yaml: evaluate.0.categories: the pattern of 'a' is not a regular
check recipe.yaml "evaluate.0.categories={a: 3}"
    recipe.yaml: evaluate.0.categories.a=3: Input should be a valid string
check recipe.yaml evaluate.0.max_rows=0
    recipe.yaml: evaluate.0.max_rows=0: Input should be greater than or equal to
check recipe.yaml evaluate.0.max_new_tokens=-1
    recipe.yaml: evaluate.0.max_new_tokens=-1: Input should be greater than or
check recipe.yaml evaluate.0.batch_size=0
    recipe.yaml: evaluate.0.batch_size=0: Input should be greater than or equal
check recipe.yaml evaluate.0.baselines=[none]
    recipe.yaml: evaluate.0.baselines.0='none': Input should be 'blank_images' or
check recipe.yaml evaluate.0.include=3
    recipe.yaml: evaluate.0.include=3: Input should be a valid tuple
check recipe.yaml "evaluate=[{name: a, questions: q}, {name: a, questions: q}]"
    recipe.yaml: evaluate names ['a', 'a'] must differ; give each benchmark its
check recipe.yaml name=a/b
    recipe.yaml: name='a/b': String should match pattern
check recipe.yaml name=..
    recipe.yaml: name='..': String should match pattern
check recipe.yaml name=
    recipe.yaml: name=None: Input should be a valid string
check recipe.yaml data=3
    recipe.yaml: data=3: Input should be a valid string
check recipe.yaml model=null
    recipe.yaml: model=None: Input should be a valid dictionary or instance of
check recipe.yaml model.language=null
    recipe.yaml: model.language=None: Input should be a valid dictionary or
check recipe.yaml model.language.name=
    recipe.yaml: model.language.name=None: Input should be a valid string
check recipe.yaml model.language.name=[1]
    recipe.yaml: model.language.name=[1]: Input should be a valid string
check recipe.yaml model.language.name=./nowhere
    model.language.name=./nowhere: no such folder; give a Hugging Face folder or
check toy
    model.vision.name=toy/backbones/clip: no such folder here; build it with `raylava toy toy`
check recipe.yaml model.language.name=bert-base
    model.language.name='bert-base' is neither a folder nor a known hub id;
check recipe.yaml model.language.family=bert
    model.language.family='bert' is not supported; choose one of: gemma
check recipe.yaml model.vision.name=nonsense://x
    cannot use 'nonsense://x' as a storage location: ArrowInvalid: Unrecognized
check recipe.yaml model.vision.image_size=0
    recipe.yaml: model.vision.image_size=0: Input should be greater than or equal
check recipe.yaml model.vision.image_size=37
    model.vision.image_size=37 is not a multiple of
check recipe.yaml model.vision.resize_size=9999
    recipe.yaml: model.vision.resize_size=9999: Input should be less than or
check recipe.yaml model.connector.feature_scale=sqrt
    recipe.yaml: model.connector.feature_scale='sqrt': Input should be
check recipe.yaml model.initial_weights.name=x model.initial_weights.transformers_version=4.4
    recipe.yaml: model.initial_weights.transformers_version=4.4: 4.4 is a number;
check recipe.yaml corpora.instruction=null
    recipe.yaml: corpora.instruction=None: Input should be a valid dictionary or
check recipe.yaml corpora.alignment=null
    recipe.yaml: pretrain is enabled but corpora.alignment is missing; add it or
check recipe.yaml corpora.instruction.sources=[]
    recipe.yaml: corpora.instruction.sources=[]: Tuple should have at least 1
check recipe.yaml corpora.instruction.sources=3
    recipe.yaml: corpora.instruction.sources=3: Input should be a valid tuple
check recipe.yaml corpora.instruction.sources.0=x
    recipe.yaml: corpora.instruction.sources.0='x': Input should be a valid
check recipe.yaml corpora.instruction.sources.0.format=xml
    recipe.yaml: corpora.instruction.sources.0.format='xml': Input should be
check recipe.yaml corpora.instruction.sources.0.max_rows=0
    recipe.yaml: corpora.instruction.sources.0.max_rows=0: Input should be
check recipe.yaml corpora.instruction.sources.0.sampling_weight=0
    recipe.yaml: corpora.instruction.sources.0.sampling_weight=0: Input should be
check recipe.yaml corpora.instruction.sources.0.sampling_weight=.nan
    recipe.yaml: corpora.instruction.sources.0.sampling_weight=nan: Input should
check recipe.yaml corpora.instruction.sources.0.sampling_weight=-1
    recipe.yaml: corpora.instruction.sources.0.sampling_weight=-1: Input should
check recipe.yaml corpora.instruction.max_length=1
    recipe.yaml: corpora.instruction.max_length=1: Input should be greater than
check recipe.yaml corpora.instruction.max_pixels=0
    recipe.yaml: corpora.instruction.max_pixels=0: Input should be greater than
check recipe.yaml corpora.instruction.max_chars=-5
    recipe.yaml: corpora.instruction.max_chars=-5: Input should be greater than
check recipe.yaml corpora.instruction.max_image_bytes=0
    recipe.yaml: corpora.instruction.max_image_bytes=0: Input should be greater
check recipe.yaml corpora.instruction.quarantine_limit=2
    recipe.yaml: corpora.instruction.quarantine_limit=2: Input should be less
check recipe.yaml corpora.instruction.samples_per_block=0
    recipe.yaml: corpora.instruction.samples_per_block=0: Input should be greater
check recipe.yaml corpora.instruction.image_encoding.quality=0
    recipe.yaml: corpora.alignment.image_encoding.quality=0: Input should be
check recipe.yaml corpora.instruction.image_encoding.format=gif
    recipe.yaml: corpora.alignment.image_encoding.format='gif': Input should be
check recipe.yaml corpora.instruction.image_aspect=squash
    recipe.yaml: corpora.instruction.image_aspect='squash': Input should be 'pad'
check recipe.yaml corpora.instruction.on_overlong=keep
    recipe.yaml: corpora.instruction.on_overlong='keep': Input should be
check recipe.yaml corpora.instruction.operators=[nonsense]
    corpora.instruction.operators: unknown operator 'nonsense'; choose one of:
check recipe.yaml corpora.instruction.operators=[[1]]
    recipe.yaml: corpora.instruction.operators.0=[1]: an operator is its name, or
check recipe.yaml corpora.instruction.operators=[os:nonsense]
    corpora.instruction.operators: os:nonsense cannot be imported
check recipe.yaml corpora.instruction.operators=[nowhere:nonsense]
    corpora.instruction.operators: nowhere:nonsense cannot be imported
check recipe.yaml "corpora.instruction.operators=[{answer_words: {minimum: x}}]"
    corpora.instruction.operators: answer_words does not take these arguments:
check recipe.yaml "corpora.instruction.operators=[{answer_words: {nonsense: 3}}]"
    corpora.instruction.operators: answer_words does not take these arguments:
check recipe.yaml "corpora.instruction.operators=[{answer_words: 3}]"
    recipe.yaml: corpora.instruction.operators.0.arguments=3: Input should be a
check recipe.yaml "corpora.instruction.operators=[{without_pattern: {pattern: '('}}]"
    corpora.instruction.operators: without_pattern does not take these arguments:
check recipe.yaml "corpora.instruction.operators=[{decontaminate: {benchmarks: [nonsense]}}]"
    corpora.instruction.operators: 'nonsense' is no benchmark of evaluate; choose
check recipe.yaml corpora.instruction.fetch.timeout_s=0
    recipe.yaml: corpora.instruction.fetch.timeout_s=0: Input should be greater
check recipe.yaml corpora.instruction.fetch.retries=-1
    recipe.yaml: corpora.instruction.fetch.retries=-1: Input should be greater
check recipe.yaml finetune.lr=0
    recipe.yaml: finetune.lr=0: Input should be greater than 0
check recipe.yaml finetune.lr=.inf
    recipe.yaml: finetune.lr=inf: Input should be a finite number
check recipe.yaml finetune.lr=.nan
    recipe.yaml: finetune.lr=nan: Input should be a finite number
check recipe.yaml finetune.lr=abc
    recipe.yaml: finetune.lr='abc': Input should be a valid number, unable to
check recipe.yaml finetune.epochs=0
    recipe.yaml: finetune.epochs=0: Input should be greater than or equal to 1
check recipe.yaml finetune.max_steps=0
    recipe.yaml: finetune.max_steps=0: Input should be greater than or equal to 1
check recipe.yaml finetune.global_batch_size=-8
    recipe.yaml: finetune.global_batch_size=-8: Input should be greater than or
check recipe.yaml finetune.warmup_ratio=1.5
    recipe.yaml: finetune.warmup_ratio=1.5: Input should be less than or equal to
check recipe.yaml finetune.betas=[0.9]
    recipe.yaml: finetune.betas.1 is missing; add it to the file or give
check recipe.yaml finetune.betas=[2,3]
    recipe.yaml: finetune.betas.0=2: Input should be less than or equal to 1 (and
check recipe.yaml finetune.eps=0
    recipe.yaml: finetune.eps=0: Input should be greater than 0
check recipe.yaml finetune.weight_decay=-1
    recipe.yaml: finetune.weight_decay=-1: Input should be greater than or equal
check recipe.yaml finetune.weight_decay=.nan
    recipe.yaml: finetune.weight_decay=nan: Input should be a finite number
check recipe.yaml finetune.max_grad_norm=0
    recipe.yaml: finetune.max_grad_norm=0: Input should be greater than 0
check recipe.yaml finetune.max_grad_norm=.nan
    recipe.yaml: finetune.max_grad_norm=nan: Input should be a finite number
check recipe.yaml finetune.precision=fp8
    recipe.yaml: finetune.precision='fp8': Input should be 'bf16' or 'fp32'
check recipe.yaml finetune.lr_schedule=step
    recipe.yaml: finetune.lr_schedule='step': Input should be 'cosine', 'linear'
check recipe.yaml finetune.max_tokens_per_pack=10
    recipe.yaml: finetune.max_tokens_per_pack.constrained-int=10: Input should be
check recipe.yaml finetune.max_tokens_per_pack=20
    recipe.yaml: finetune.max_tokens_per_pack=20 is less than its corpus's
check recipe.yaml finetune.zero.stage=4
    recipe.yaml: finetune.zero.stage=4: Input should be 0, 1, 2, 3 or 'auto'
check recipe.yaml finetune.zero=2
    recipe.yaml: finetune.zero=2: Input should be a valid dictionary or instance
check recipe.yaml finetune.zero.offload_parameters=true
    recipe.yaml: finetune.zero: offload_parameters needs ZeRO stage 3; set
check recipe.yaml finetune.attn_implementation=magic
    recipe.yaml: finetune.attn_implementation='magic': Input should be 'varlen',
check recipe.yaml finetune.deepspeed.optimizer=x
    recipe.yaml: finetune.deepspeed: optimizer is set by raylava, from zero,
check recipe.yaml finetune.deepspeed=3
    recipe.yaml: finetune.deepspeed=3: Input should be a valid dictionary
check recipe.yaml finetune.deepspeed.zero_optimization=3
    recipe.yaml: finetune.deepspeed: zero_optimization=3 is not a mapping of
check recipe.yaml finetune.loss_group_size=3
    recipe.yaml: finetune: loss_group_size applies to loss_weighting: groups
check recipe.yaml finetune.loss_weighting=groups
    recipe.yaml: finetune: loss_weighting=groups needs loss_group_size; set it to
check recipe.yaml finetune.checkpoint.interval_minutes=0
    recipe.yaml: pretrain.checkpoint.interval_minutes=0: Input should be greater
check recipe.yaml finetune.checkpoint.keep_latest=0
    recipe.yaml: pretrain.checkpoint.keep_latest=0: Input should be greater than
check recipe.yaml finetune.checkpoint.keep_best=true
    recipe.yaml: pretrain.checkpoint: keep_best=true compares checkpoints at
check recipe.yaml finetune.max_consecutive_skips=0
    recipe.yaml: finetune.max_consecutive_skips=0: Input should be greater than
check recipe.yaml finetune.enabled=false
    recipe.yaml: finetune.enabled=false: a recipe always finetunes; to train the
check recipe.yaml finetune.compile=true finetune.zero.stage=3
    recipe.yaml: finetune: compile gives wrong losses beside ZeRO stage 3's
check recipe.yaml finetune.attn_implementation=flash_attention_2
    recipe.yaml: finetune.attn_implementation='flash_attention_2': flash-attn is
check recipe.yaml resources.workers=0
    recipe.yaml: resources.workers=0: Input should be greater than or equal to 1
check recipe.yaml resources.workers=100000000000000000000
    recipe.yaml: resources.workers=100000000000000000000: Input should be less
check recipe.yaml resources.min_workers=5
    recipe.yaml: resources: min_workers=5 is more than workers=2; lower it
check recipe.yaml resources.gpus_per_worker=-1
    recipe.yaml: resources.gpus_per_worker=-1: Input should be greater than or
check recipe.yaml resources.gpus_per_worker=2
    recipe.yaml: resources.gpus_per_worker=2: a worker trains on one GPU; set it to
check recipe.yaml resources.cpus_per_worker=0
    recipe.yaml: resources.cpus_per_worker=0: Input should be greater than or
check recipe.yaml resources.cache_gb=.inf
    recipe.yaml: resources.cache_gb=inf: Input should be a finite number
check recipe.yaml resources.cache_gb=0
    recipe.yaml: resources.cache_gb=0: Input should be greater than 0
check recipe.yaml resources.train_node_labels=3
    recipe.yaml: resources.train_node_labels=3: Input should be a valid
check recipe.yaml --cluster nowhere.yaml
    nowhere.yaml: not a valid cluster file: FileNotFoundError [Errno 2] No such
check recipe.yaml --cluster cluster.yaml
    cluster.yaml: not a valid cluster file: ParserError while parsing a flow node
check recipe.yaml --cluster cluster-types.yaml
    cluster-types.yaml: not a valid cluster file: AttributeError 'int' object has
check recipe.yaml --cluster empty.yaml
    empty.yaml: neither a `ray up` file nor a RayCluster or RayJob; see cluster/
check recipe.yaml --cluster folder.yaml
    folder.yaml: not a valid cluster file: IsADirectoryError [Errno 21] Is a
check recipe.yaml --cluster binary.yaml
    binary.yaml: not a valid cluster file: UnicodeDecodeError 'utf-8' codec can't
check recipe.yaml --address auto --cluster cluster.yaml
    check takes --cluster FILE or --address URL; leave one out
check recipe.yaml --address http://127.0.0.1:1
    --address http://127.0.0.1:1: ConnectionError: Failed to connect to Ray at
run recipe.yaml --storage s3:/b
    s3:/b: has one slash after s3:; did you mean s3://b?
run recipe.yaml --storage nonsense://b
    cannot use 'nonsense://b' as a storage location: ArrowInvalid: Unrecognized
run recipe.yaml --storage s3://
    s3://: names no bucket; give such as s3://BUCKET/raylava
run recipe.yaml --storage ""
    --storage is empty; name a folder or bucket you own
run recipe.yaml --storage file
    --storage file: cannot write there
run recipe.yaml --storage /dev/null
    --storage /dev/null: cannot write there
run recipe.yaml --storage /proc/raylava
    --storage /proc/raylava: cannot write there
run recipe.yaml --only finetune
    Invalid value for '--only': Value error, 'finetune' is not one of 'prepare'.;
run recipe.yaml data=nowhere
    evaluate.heldout.questions: nowhere/questions.jsonl: no such file
run recipe.yaml corpora.instruction.sources.0.annotations=cut.json data=data
    data/cut.json: not JSON at byte 4
run recipe.yaml corpora.instruction.sources.0.annotations=comma.json data=data
    data/comma.json: not JSON at byte 1: Expecting property name enclosed in
run recipe.yaml corpora.instruction.sources.0.annotations=latin.json data=data
    data/latin.json: not JSON: 'utf-8' codec can't decode byte 0xe9 in position
run recipe.yaml corpora.instruction.sources.0.annotations=empty.json data=data
    data/empty.json: incomplete JSON: the list is not closed (byte 0)
run recipe.yaml corpora.instruction.sources.0.annotations=no-rows.json data=data
    data/no-rows.json: the list is empty; LLaVA JSON is a non-empty list of rows
run recipe.yaml corpora.instruction.sources.0.annotations=object.json data=data
    data/object.json: not LLaVA JSON, a non-empty list of rows: it does not begin
run recipe.yaml corpora.instruction.sources.0.annotations=no-talk.json data=data
    data/no-talk.json: not LLaVA JSON: no row has `conversations`
run recipe.yaml corpora.instruction.sources.0.annotations=html.json data=data
    data/html.json: not LLaVA JSON, a non-empty list of rows: it does not begin
run recipe.yaml corpora.instruction.sources.0.annotations=packed.json data=data
    data/packed.json: compressed with gzip, so that its rows cannot be read by
run recipe.yaml corpora.instruction.sources.0.annotations=utf16.json data=data
    data/utf16.json: UTF-16 or UTF-32; convert it to UTF-8
run recipe.yaml corpora.instruction.sources.0.annotations=empty.jsonl data=data
    data/empty.jsonl: contains no rows
run recipe.yaml corpora.instruction.sources.0.annotations=empty.parquet data=data
    data/empty.parquet: is empty; copy the file again
run recipe.yaml corpora.instruction.sources.0.annotations=text.parquet data=data
    data/text.parquet: not Parquet, or cut off; copy the file again
run recipe.yaml corpora.instruction.sources.0.annotations=empty.tar data=data
    data/empty.tar: is empty; copy the file again
run recipe.yaml corpora.instruction.sources.0.annotations=text.tar data=data
    data/text.tar: not a tar, or cut off: its size is no multiple of 512 bytes
run recipe.yaml corpora.instruction.sources.0.annotations=data.csv data=data
    data/data.csv: the file name does not indicate its format; set format to one
run recipe.yaml corpora.instruction.sources.0.annotations=nothing data=data
    data/nothing: contains no file of a known format (.json, .jsonl, .ndjson,
run recipe.yaml corpora.instruction.sources.0.annotations=nowhere.json data=data
    data/nowhere.json: no such file; set the source's annotations (or data=…)
run recipe.yaml corpora.instruction.sources.0.images=nowhere data=data
    data/nowhere: no such image folder; set the source's images (or data=…)
run recipe.yaml corpora.instruction.sources.0.images=instruction.json data=data
    data/instruction.json: no such image folder; set the source's images (or
run recipe.yaml corpora.instruction.sources.0.include=[nothing] data=data
    corpora.instruction: no row is selected; relax include and exclude of its
run recipe.yaml model.vision.name=clip/no-config
    model.vision.name=clip/no-config: no config.json with a model_type there;
run recipe.yaml model.vision.name=clip/config-cut
    clip/config-cut/config.json: damaged
run recipe.yaml model.vision.name=clip/config-list
    clip/config-list/config.json: damaged (not a mapping); copy the model's
run recipe.yaml model.vision.name=clip/config-type
    model.vision.name=clip/config-type: 'bert' is not a supported vision family;
run recipe.yaml model.vision.name=clip/config-types
    model.vision.image_size=96: clip/config-types takes 224 only
run recipe.yaml model.vision.name=clip/no-weights
    clip/no-weights: has neither model.safetensors nor pytorch_model.bin; give a
run recipe.yaml model.vision.name=clip/weights-cut
    clip/weights-cut/model.safetensors: damaged or cut off; copy the folder again
run recipe.yaml model.vision.name=clip/weights-html
    clip/weights-html/model.safetensors: damaged or cut off; copy the folder
run recipe.yaml model.vision.name=clip/no-processor
    model.vision.name=clip/no-processor: has no preprocessor_config.json; give a
run recipe.yaml model.vision.name=clip/processor-cut
    clip/processor-cut/preprocessor_config.json: damaged
run recipe.yaml model.vision.name=clip/processor-types
    model.vision.name=clip/processor-types: a value in its
run recipe.yaml model.language.name=gemma/no-config
    model.language.name=gemma/no-config: no config.json with a model_type there;
run recipe.yaml model.language.name=gemma/config-cut
    gemma/config-cut/config.json: damaged
run recipe.yaml model.language.name=gemma/config-list
    gemma/config-list/config.json: damaged (not a mapping); copy the model's
run recipe.yaml model.language.name=gemma/config-type
    model.language.name=gemma/config-type: 'bert' is not a supported language
run recipe.yaml model.language.name=gemma/config-types
    model.language.name=gemma/config-types: a value in its config.json is missing
run recipe.yaml model.language.name=gemma/no-weights
    gemma/no-weights: has neither model.safetensors nor pytorch_model.bin; give a
run recipe.yaml model.language.name=gemma/weights-cut
    gemma/weights-cut/model.safetensors: damaged or cut off; copy the folder
run recipe.yaml model.language.name=gemma/weights-html
    gemma/weights-html/model.safetensors: damaged or cut off; copy the folder
run recipe.yaml model.language.name=gemma/no-tokenizer
    model.language.name=gemma/no-tokenizer: has no tokenizer (tokenizer.json or
run recipe.yaml model.language.name=gemma/tokenizer-cut
    model.language.name=gemma/tokenizer-cut: cannot load a tokenizer from there
run recipe.yaml model.language.name=gemma/tokenizer-list
    model.language.name=gemma/tokenizer-list: cannot load a tokenizer from there
run recipe.yaml model.connector.weights=nowhere pretrain.enabled=false
    model.connector.weights=nowhere: no raylava connector there
run recipe.yaml model.connector.weights=file pretrain.enabled=false
    model.connector.weights=file: no raylava connector there
run recipe.yaml evaluate.0.questions=nowhere.jsonl
    evaluate.heldout.questions:
run recipe.yaml evaluate.0.questions=folder.yaml data=.
    evaluate.heldout.questions: folder.yaml: a folder; name the file of
run recipe.yaml model.initial_weights.name=gemma/no-config
    gemma/no-config: no config.json of a LLaVA model there; give a Hugging Face
run recipe.yaml model.initial_weights.name=gemma/config-cut
    gemma/config-cut/config.json: damaged
train recipe.yaml nonsense
    Invalid value for 'STAGE': Value error, 'nonsense' is not one of 'pretrain',
train recipe.yaml pretrain resources.gpus_per_worker=1
    resources.gpus_per_worker=1: torch finds no GPU on this machine; set it to 0
train recipe.yaml pretrain resources.workers=2 resources.min_workers=1
    resources.min_workers=1 needs Ray; remove it, or train with `raylava run`
train nowhere.yaml pretrain
    nowhere.yaml: cannot read the recipe
sweep nowhere.yaml
    nowhere.yaml: cannot read the sweep
sweep recipe.yaml
    recipe.yaml: name is missing; add it to the file or give name=… (and 4 more)
sweep list.yaml
    list.yaml: a sweep is a mapping of keys to values, this is a list
sweep sweep-name.yaml
    sweep-name.yaml: name='..': String should match pattern
sweep sweep-dot.yaml
    sweep-dot.yaml: name='.': String should match pattern
sweep sweep-slash.yaml
    sweep-slash.yaml: name='a/b': String should match pattern
sweep sweep-recipe.yaml
    nowhere.yaml: cannot read the recipe
sweep sweep-recipe-number.yaml
    sweep-recipe-number.yaml: recipe=3: Input should be a valid string
sweep sweep-recipe-list.yaml
    list.yaml: a recipe is a mapping of keys to values, this is a list
sweep sweep-axis.yaml
    sweep-axis.yaml: axis 'loss' has the name of a column of results.csv; rename
sweep sweep-axis-list.yaml
    sweep-axis-list.yaml: axes=['lr']: Input should be a valid dictionary
sweep sweep-axis-number.yaml
    sweep-axis-number.yaml: axes.lr=3: Input should be a valid dictionary
sweep sweep-level.yaml
    sweep-level.yaml: axes.lr: level 'a' must give recipe keys and values, such
sweep sweep-level-key.yaml
    s (lr=a): unknown key 'finetune.lrr'; did you mean 'finetune.lr'?
sweep sweep-level-empty.yaml
    sweep-level-empty.yaml: axes.lr: level 'a' must give recipe keys and values,
sweep sweep-level-number-key.yaml
    sweep-level-number-key.yaml: axes.lr: level 'a' has the key 1, which is no
sweep sweep-exclude.yaml
    sweep-exclude.yaml: exclude names an unknown axis 'lrr'; choose one of: lr
sweep sweep-exclude-all.yaml
    every combination of the sweep is excluded; remove an `exclude`
sweep sweep-seeds.yaml
    sweep-seeds.yaml: seeds [1, 1] must differ; remove the repeated ones
sweep sweep-seeds-negative.yaml
    sweep-seeds-negative.yaml: seeds.0=-1: Input should be greater than or equal
sweep sweep-seeds-text.yaml
    sweep-seeds-text.yaml: seeds='many': Input should be a valid tuple
sweep sweep-set.yaml
    s (lr=a): unknown key 'finetune.lrr'; did you mean 'finetune.lr'?
sweep sweep-concurrent.yaml
    sweep-concurrent.yaml: max_concurrent_trials=0: Input should be greater than
sweep sweep-unknown.yaml
    sweep-unknown.yaml: unknown key 'axis'; did you mean 'axes'?
sweep sweep-search.yaml
    sweep-search.yaml: search.space is missing; add it to the file or give
sweep sweep-range.yaml
    sweep-range.yaml: search.space.finetune.lr: the lower end 2.0 must be below
sweep sweep-log.yaml
    sweep-log.yaml: search.space.finetune.lr: loguniform must start above 0, not
sweep sweep-range-out.yaml
    search.space: finetune.lr is also set by an axis, `set`, seeds or the command
sweep sweep-range-key.yaml
    s (lr=a, finetune.lrr=1.0): unknown key 'finetune.lrr'; did you mean
sweep sweep-objective.yaml
    search.space: finetune.lr is also set by an axis, `set`, seeds or the command
sweep sweep-direction.yaml
    sweep-direction.yaml: search.objective.loss='down': Input should be 'min' or
sweep sweep-trials.yaml
    sweep-trials.yaml: search.trials=-1: Input should be greater than or equal to
sweep sweep-budget.yaml
    sweep-budget.yaml: search: a search needs a budget; give trials (of each
sweep sweep-study.yaml
    sweep-study.yaml: search.study='a b': String should match pattern
sweep sweep-database.yaml
    search.space: finetune.lr is also set by an axis, `set`, seeds or the command
sweep sweep-database-file.yaml
    search.space: finetune.lr is also set by an axis, `set`, seeds or the command
sweep sweep-variable.yaml
    search.space: finetune.lr is also set by an axis, `set`, seeds or the command
sweep sweep-nan.yaml
    sweep-nan.yaml: search.space.finetune.lr.uniform.0=nan: Input should be a
sweep sweep-infinite.yaml
    sweep-infinite.yaml: search.space.finetune.lr.uniform.1=inf: Input should be
sweep sweep.yaml --prices prices.yaml
    prices.yaml: h100x8: -1 is not a price; write such as `h100x8: 60.0`, a
sweep sweep.yaml --prices prices-text.yaml
    prices-text.yaml: h100x8: 'cheap' is not a price; write such as `h100x8:
sweep sweep.yaml --prices prices-name.yaml
    prices-name.yaml: toaster: 1.0 is not a price; write such as `h100x8: 60.0`,
sweep sweep.yaml seed
    'seed' is not an override; write key=value, for example finetune.lr=1e-5
submit recipe.yaml
    --storage raylava-storage: a job runs in its own working directory; use a
submit recipe.yaml --storage /tmp/x
    no cluster address; give --address http://HOST:8265, or set
submit recipe.yaml --storage /tmp/x --address nonsense
    --address nonsense: ValueError: Invalid address format: nonsense
submit recipe.yaml --storage /tmp/x --address http://127.0.0.1:1
    --address http://127.0.0.1:1: ConnectionError: Failed to connect to Ray at
submit recipe.yaml --storage /tmp/x --address http://
    --address http://: ConnectionError: Failed to connect to Ray at address:
submit nowhere.yaml --storage /tmp/x --address http://127.0.0.1:1
    nowhere.yaml: cannot read the recipe or sweep
submit list.yaml --storage /tmp/x --address http://127.0.0.1:1
    list.yaml: a recipe or sweep is a mapping of keys to values, this is a list
submit sweep-recipe-number.yaml --storage /tmp/x --address http://127.0.0.1:1
    sweep-recipe-number.yaml: recipe=3: Input should be a valid string
submit recipe.yaml --storage s3://b --address http://127.0.0.1:1
    --address http://127.0.0.1:1: ConnectionError: Failed to connect to Ray at
stop recipe.yaml
    --storage raylava-storage: a job runs in its own working directory; use a
stop recipe.yaml --storage /tmp/x --address http://127.0.0.1:1
    --address http://127.0.0.1:1: ConnectionError: Failed to connect to Ray at
estimate nowhere.yaml
    nowhere.yaml: cannot read the recipe
estimate recipe.yaml --gpu toaster
    --gpu toaster: unknown GPU; choose one of: gb200, b200, gh200, h200,
estimate recipe.yaml --mfu 2
    Invalid value for '--mfu': 2 is not above 0 and at most 1; see `raylava
estimate recipe.yaml --mfu x
    Invalid value for '--mfu': x is not a number; see `raylava estimate --help`
estimate recipe.yaml --mfu nan
    Invalid value for '--mfu': nan is not above 0 and at most 1; see `raylava
estimate recipe.yaml --nodes -1
    Invalid value for '--nodes': Input should be greater than or equal to 1; see
estimate recipe.yaml --spot -1
    Invalid value for '--spot': -1 is not between 0 and 1,000; see `raylava
estimate recipe.yaml --simulate --spot nan
    Invalid value for '--spot': nan is not between 0 and 1,000; see `raylava
estimate recipe.yaml --prices nowhere.yaml
    nowhere.yaml: cannot read the price table
estimate recipe.yaml --prices prices.yaml
    prices.yaml: h100x8: -1 is not a price; write such as `h100x8: 60.0`, a
estimate recipe.yaml --prices prices-text.yaml
    prices-text.yaml: h100x8: 'cheap' is not a price; write such as `h100x8:
estimate recipe.yaml --prices list.yaml
    list.yaml: a price table is a mapping of keys to values, this is a list
estimate recipe.yaml --corpus nowhere
    --corpus nowhere: no prepared corpus there; make one with `raylava run --only
estimate recipe.yaml --corpus instruction=damaged/cut
    --corpus damaged/cut: no prepared corpus there; make one with `raylava run
estimate recipe.yaml --corpus nonsense=data
    --corpus nonsense=…: a recipe's corpora are alignment and instruction
estimate recipe.yaml --rows instruction
    --rows instruction=instruction: give a number above 0
estimate recipe.yaml --rows instruction=-5
    --rows instruction=-5: give a number above 0
estimate recipe.yaml --rows instruction=x
    --rows instruction=x: give a number above 0
estimate recipe.yaml --rows nonsense=5
    --rows nonsense=…: a recipe's corpora are alignment and instruction
estimate sweep.yaml
    sweep.yaml: model is missing; add it to the file or give model=… (and 3 more)
estimate recipe.yaml --sweep
    recipe.yaml: name is missing; add it to the file or give name=… (and 4 more)
estimate recipe.yaml --spot 1
    --spot applies to a simulated run only; add --simulate
evaluate nowhere --benchmark custom --data questions/good.jsonl
    nowhere@main: the hub cannot be reached and no copy is cached; use a folder
evaluate gemma/no-config --benchmark custom --data questions/good.jsonl
    gemma/no-config: no model found (no config.json); give a finetune artifact or
evaluate gemma/config-cut --benchmark custom --data questions/good.jsonl
    gemma/config-cut/config.json: damaged
evaluate gemma/config-list --benchmark custom --data questions/good.jsonl
    gemma/config-list/config.json: damaged (not a mapping); copy the model's
evaluate gemma/config-types --benchmark custom --data questions/good.jsonl
    gemma/config-types: no config.json of a LLaVA model there; give a Hugging
evaluate file --benchmark custom --data questions/good.jsonl
    file@main: the hub cannot be reached and no copy is cached; use a folder
evaluate someone/model --benchmark custom --data questions/good.jsonl
    someone/model@main: the hub cannot be reached and no copy is cached; use a
evaluate gemma/weights-cut --benchmark nonsense --data questions/good.jsonl
    nonsense: unknown benchmark; choose one of: pope, gqa, vqav2, mme, mmvp,
evaluate x --benchmark custom --data questions/good.jsonl --engine vllm
    No such option: --engine (Possible options: --endpoint); see `raylava
evaluate x --benchmark custom --data questions/good.jsonl --endpoint nonsense
    --endpoint nonsense: not a URL; give one such as http://127.0.0.1:8000/v1
evaluate x --benchmark custom --data questions/good.jsonl --endpoint http://
    --endpoint http://: not a URL; give one such as http://127.0.0.1:8000/v1
evaluate x --benchmark custom --data questions/good.jsonl --endpoint http://host:port/v1
    --endpoint http://host:port/v1: not a URL; give one such as
evaluate x --benchmark custom --data questions/good.jsonl --endpoint ftp://host/v1
    --endpoint ftp://host/v1: not a URL; give one such as
evaluate x --benchmark custom --data questions/good.jsonl --endpoint http://me:planted@host/v1
    --endpoint http://…@host/v1: contains a user or password; remove it, and
evaluate x --benchmark custom --data questions/good.jsonl --endpoint 'http://host/v1?key=planted'
    --endpoint http://host/v1: has a query or fragment; remove it, and give a key
evaluate x --benchmark custom --data questions/good.jsonl --endpoint http://host/v1 --start-vllm
    --start-vllm: starts servers, and --endpoint names running ones; omit
evaluate x --benchmark custom --data questions/good.jsonl --endpoint http://host/v1 --workers 2
    --workers, --gpus-per-worker: with --endpoint, no model is loaded; omit
evaluate x --benchmark custom --data questions/good.jsonl --endpoint http://host/v1 --precision fp32
    --precision fp32: with --endpoint, the server determines it; omit the
evaluate x --benchmark custom --data questions/good.jsonl --endpoint http://host/v1 --concurrency 0
    Invalid value for '--concurrency': Input should be greater than or equal
evaluate x --benchmark custom --data questions/good.jsonl --concurrency 4
    --concurrency applies to servers only; add --endpoint URL or --start-vllm
evaluate x --benchmark custom --data questions/good.jsonl --served-model toy
    --served-model applies to running servers only; add --endpoint URL
evaluate x --benchmark custom --data questions/good.jsonl --start-vllm
    --start-vllm: vLLM needs a GPU; add --gpus-per-worker 1
evaluate x --benchmark custom --data questions/good.jsonl --precision fp8
    --precision fp8: unknown precision; choose one of: auto, fp32, bf16, fp16
evaluate x --benchmark custom --data questions/good.jsonl --metric nonsense
    --metric nonsense: unknown metric; choose one of: exact_match, vqa_accuracy,
evaluate x --benchmark custom --data questions/good.jsonl --protocol nonsense
    protocol nonsense: unknown for custom; choose one of: gqa
evaluate x --benchmark custom --data questions/good.jsonl --limit -1
    Invalid value for '--limit': Input should be greater than or equal to 1; see
evaluate x --benchmark custom --data questions/good.jsonl --batch-size 0
    Invalid value for '--batch-size': Input should be greater than or equal to 1;
evaluate x --benchmark custom --data questions/good.jsonl --workers 0
    Invalid value for '--workers': Input should be greater than or equal to 1;
evaluate x --benchmark custom --data nowhere.jsonl
    evaluate.custom.questions: nowhere.jsonl: no such file
evaluate artifacts/prepare --benchmark custom --data questions/good.jsonl
    artifacts/prepare: no model found (no config.json); give a finetune artifact
score gqa --data gqa
    score needs answers; give --answers FILE (--grades FILE where a judge grades)
score gqa --data gqa --answers nowhere.jsonl
    nowhere.jsonl: no such file
score gqa --data gqa --answers gqa
    gqa: cannot be read
score gqa --data nowhere --answers answers.jsonl
    nowhere: testdev_balanced_questions.json is missing; give the folder of the
score gqa --data file --answers answers.jsonl
    file: testdev_balanced_questions.json is missing; give the folder of the
score gqa --data pope --answers answers.jsonl
    pope: testdev_balanced_questions.json is missing; give the folder of the
score gqa --data gqa-cut --answers answers.jsonl
    gqa-cut/testdev_balanced_questions.json: not JSON
score gqa --data gqa-list --answers answers.jsonl
    gqa-list: not the official files of gqa
score gqa --data gqa-number --answers answers.jsonl
    gqa-number: not the official files of gqa
score gqa --data gqa-types --answers answers.jsonl
    gqa-types: not the official files of gqa
score gqa --data gqa --answers questions/given-cut.jsonl
    questions/given-cut.jsonl: not a file of answers
score gqa --data gqa --answers questions/given-list.jsonl
    questions/given-list.jsonl: contains no answers; each entry needs question_id
score gqa --data gqa --answers questions/given-number.jsonl
    questions/given-number.jsonl: not a file of answers
score gqa --data gqa --answers questions/given-no-id.jsonl
    questions/given-no-id.jsonl: the answer to 'text' has no question in the
score gqa --data gqa --answers questions/given-twice.jsonl
    questions/given-twice.jsonl:1: not a file of answers
score gqa --data gqa --answers questions/given-empty.jsonl
    questions/given-empty.jsonl: not a file of answers
score gqa --data gqa --answers questions/given-deep.jsonl
    questions/given-deep.jsonl: not a file of answers
score gqa --data gqa --answers questions/binary.jsonl
    questions/binary.jsonl: cannot be read
score pope --data pope --answers answers.jsonl
    answers.jsonl: the answer to '201' has no question in the benchmark's files
score pope --data pope --answers answers.jsonl --protocol nonsense
    protocol nonsense: unknown for pope; choose one of: llava, lmms-eval
score gqa --data gqa --answers answers.jsonl --protocol lmms-eval
    protocol lmms-eval: unknown for gqa; choose one of: gqa
score nonsense --data gqa --answers answers.jsonl
    nonsense: unknown benchmark; choose one of: pope, gqa, vqav2, mme, mmvp,
score mm-vet --data mm-vet --answers answers.jsonl
    mm-vet is graded by a judge; give the judge's reply file as --grades
score mm-vet --data mm-vet --grades nowhere.json
    nowhere.json: not a file of grades
score mm-vet --data mm-vet --grades questions/grade-2.json
    questions/grade-2.json: not a file of grades
score mm-vet --data mm-vet --grades questions/grade-text.json
    questions/grade-text.json: not a file of grades
score mm-vet --data mm-vet --grades questions/grade-unknown.json
    questions/grade-unknown.json: the grade of 'v9_9' has no question in the
score mm-vet --data mm-vet --grades questions/list.jsonl
    questions/list.jsonl: not a file of grades
score mm-vet --data mm-vet --grades questions/binary.jsonl
    questions/binary.jsonl: not a file of grades
score custom --data questions/cut.jsonl --answers answers.jsonl
    questions/cut.jsonl:1: not a question
score custom --data questions/list.jsonl --answers answers.jsonl
    questions/list.jsonl:1: not a question
score custom --data questions/number.jsonl --answers answers.jsonl
    questions/number.jsonl:1: not a question
score custom --data questions/no-id.jsonl --answers answers.jsonl
    questions/no-id.jsonl:1: not a question
score custom --data questions/no-answer.jsonl --answers answers.jsonl
    questions/no-answer.jsonl:1: not a question
score custom --data questions/image.jsonl --answers answers.jsonl
    questions/image.jsonl:1: not a question
score custom --data questions/answers.jsonl --answers answers.jsonl
    questions/answers.jsonl:1: not a question
score custom --data questions/answers-empty.jsonl --answers answers.jsonl
    questions/answers-empty.jsonl: question '1' has no answer; add one, or remove
score custom --data questions/twice.jsonl --answers answers.jsonl
    questions/twice.jsonl: two questions have the id '1'; answers are matched by
score custom --data questions/empty.jsonl --answers answers.jsonl
    questions/empty.jsonl: contains no question; each line needs question_id,
score custom --data questions/deep.jsonl --answers answers.jsonl
    questions/deep.jsonl:1: not a question
score custom --data questions/binary.jsonl --answers answers.jsonl
    questions/binary.jsonl: not UTF-8 ('utf-8' codec can't decode byte 0xff in
score custom --data questions --answers answers.jsonl
    evaluate.custom.questions: questions: a folder; name the file of questions,
score custom --data data/cut.json --answers answers.jsonl
    data/cut.json: not JSON at byte 4
score custom --data data/no-talk.json --answers answers.jsonl
    data/no-talk.json: row 0 is not a conversation: no turns: no list of
score custom --data questions/good.jsonl --answers answers.jsonl --metric yes_no
    questions/good.jsonl: question '1' has the answer 'a'; yes_no needs yes or no
score custom --data questions/good.jsonl --answers answers.jsonl --metric vqa_accuracy
    questions/good.jsonl: question '1' has 1 answers; vqa_accuracy needs at least
compare nowhere nowhere
    nowhere: not a complete artifact (no artifact.json); `raylava run` prints the
compare artifacts/evaluate artifacts/evaluate
    artifacts/evaluate: not a scored evaluation; give folders below
compare artifacts/prepare artifacts/prepare
    artifacts/prepare: not a scored evaluation; give folders below
compare damaged/cut damaged/cut
    damaged/cut/artifact.json: damaged
chat nowhere hello
    nowhere@main: the hub cannot be reached and no copy is cached; use a folder
chat file hello
    file@main: the hub cannot be reached and no copy is cached; use a folder
chat gemma/config-cut hello
    gemma/config-cut: its processor cannot be loaded
chat gemma/no-config hello
    gemma/no-config: no model found (no config.json); give a finetune artifact or
chat gemma/weights-cut hello
    gemma/weights-cut: no config.json of a LLaVA model there; give a Hugging Face
chat someone/model hello
    someone/model@main: the hub cannot be reached and no copy is cached; use a
chat gemma/config-type hello --image nowhere.png
    --image nowhere.png: BadRow: image missing: nowhere.png; give an image file
chat gemma/config-type hello --max-new-tokens 0
    Invalid value for '--max-new-tokens': Input should be greater than or equal
inspect nowhere
    nowhere: not a complete artifact (no artifact.json); `raylava run` prints the
inspect artifacts/pretrain
    artifacts/pretrain: an artifact of pretrain; inspect shows artifacts of
inspect artifacts/prepare
    artifacts/prepare: not a prepared corpus (no manifest.json); give a folder
inspect damaged/empty
    damaged/empty/artifact.json: damaged
inspect damaged/cut
    damaged/cut/artifact.json: damaged
inspect damaged/list
    damaged/list/artifact.json: damaged
inspect damaged/types
    damaged/types/artifact.json: damaged
inspect damaged/binary
    damaged/binary/artifact.json: damaged
inspect artifacts/prepare seed=3
    seed=3: an artifact has no settings to change; overrides go with --source
inspect nowhere.yaml --source
    nowhere.yaml: cannot read the recipe
inspect recipe.yaml --source data=nowhere
    nowhere/alignment.json: no such file; set the source's annotations (or
show nowhere
    nowhere: not a complete artifact (no artifact.json); `raylava run` prints the
show file
    file: not a complete artifact (no artifact.json); `raylava run` prints the
show damaged/empty
    damaged/empty/artifact.json: damaged
show damaged/binary
    damaged/binary/artifact.json: damaged
verify nowhere
    nowhere: not a complete artifact (no artifact.json); `raylava run` prints the
verify damaged/cut
    damaged/cut/artifact.json: damaged
verify artifacts/pretrain
    artifacts/pretrain: was built before raylava recorded hashes; build it again
batches nowhere
    nowhere: not a complete artifact (no artifact.json); `raylava run` prints the
batches artifacts/prepare
    artifacts/prepare: an artifact of prepare; give one of pretrain or finetune
batches artifacts/pretrain
    artifacts/pretrain: its record does not describe a training stage; build the
batches damaged/list
    damaged/list/artifact.json: damaged
replay nowhere
    nowhere: no dumped step there (no replay.json); the failed run's message
replay replay
    replay/replay.json: damaged
report nowhere.yaml
    nowhere.yaml: cannot read the recipe
report recipe.yaml
    recipe.yaml: no stage of it is in
report recipe.yaml seed=-1
    recipe.yaml: seed=-1: Input should be greater than or equal to 0
report sweep.yaml --output x.html
    --output x.html: a sweep's report is written into STORAGE/sweeps; omit the
status nowhere.yaml
    nowhere.yaml: cannot read the recipe
status --storage nonsense://x
    cannot use 'nonsense://x' as a storage location: ArrowInvalid: Unrecognized
status --storage s3:/b
    s3:/b: has one slash after s3:; did you mean s3://b?
toy file
    file: exists and is not a folder of links to toy assets; name a new folder
local-cluster sideways
    Invalid value for 'up|down': Value error, 'sideways' is not one of 'up',
local-cluster up --cluster nowhere.yaml
    nowhere.yaml: not a valid cluster file: FileNotFoundError [Errno 2] No such
local-cluster up --cluster cluster.yaml
    cluster.yaml: not a valid cluster file: ParserError while parsing a flow node
local-cluster up --cluster list.yaml
    list.yaml: not a valid cluster file: TypeError list indices must be integers
preemption-watcher
    Missing option '--address'.; see `raylava preemption-watcher --help`
run
    Missing argument 'RECIPE'.; see `raylava run --help`
dance
    No such command 'dance'.; see `raylava --help`
--nonsense check recipe.yaml
    No such option: --nonsense; see `raylava --help`
--log-level loud check recipe.yaml
    Invalid value for '--log-level': Value error, 'loud' is not one of 'debug',
check recipe.yaml --log-level loud
    Invalid value for '--log-level': Value error, 'loud' is not one of 'debug',
run recipe.yaml --log-level
    Option '--log-level' requires an argument.; see `raylava --help`
--quiet check nowhere.yaml
    nowhere.yaml: cannot read the recipe
run recipe.yaml --nonsense
    No such option: --nonsense; see `raylava run --help`
"""
LINES = TABLE.strip("\n").split("\n")
MISTAKES = dict(zip(LINES[::2], (line.strip() for line in LINES[1::2]), strict=True))


@pytest.fixture(scope="module")
def folder(toy_assets: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    write_damaged_files(folder, toy_assets)
    return folder


@pytest.mark.parametrize("command", MISTAKES)
def test_mistake_is_one_line_and_status_2(
    command: str, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status = main(shlex.split(command))
    output, error = capfd.readouterr()
    assert (status, output, error.count("\n")) == (2, "", 1), error
    assert error.replace(f"{folder}{os.sep}", "").startswith(f"error: {MISTAKES[command]}")
    assert not [path for path in folder.glob("raylava-storage/*/*") if path.parent.name != "sources"], "a stage began"


@pytest.mark.parametrize(
    "command", ["show", "inspect", "verify", "replay", "report", "status --storage", "chat --image", "check"]
)
@pytest.mark.parametrize("name", ["x" * 300, "d/" * 3000, "\udcff.yaml"], ids=["name", "path", "not UTF-8"])
def test_name_that_no_file_can_have_is_one_line_and_status_2(
    command: str, name: str, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    status = main([*command.split(), name])
    error = capfd.readouterr().err
    assert (status, error.count("\n")) == (2, 1), error


def test_the_table_has_every_command_and_at_least_150_mistakes() -> None:
    from raylava.cli.app import app

    assert len(MISTAKES) >= 150
    commands = {command.name for command in [*app.registered_commands, *app.registered_groups]}
    assert {shlex.split(command)[0] for command in MISTAKES} >= commands - {"demo"}
