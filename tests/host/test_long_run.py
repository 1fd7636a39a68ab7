"""Many prompts on one process, of all kinds in turn: right each time, no graph beyond the variants, no model leaked."""

import gc
import random
import weakref

import comfy.model_management
from comfy.sd import load_lora_for_models
from hotpath_pack.devtools import checkpoints
from sampling import Counting, assert_parity, compiled, load

PROMPTS = 40


def override(func, q, *args, **kwargs):
    return func(q * 1.5, *args, **kwargs)


def test_forty_prompts_of_changing_models_sizes_batches_loras_and_patches(flux_weights):
    choose = random.Random(0)
    lora = checkpoints.lora(flux_weights)
    models = [load({name: weight * scale for name, weight in flux_weights.items()}) for scale in (1.0, 0.9)]
    gone = [weakref.ref(model.model) for model in models]
    graphs = []
    for seed in range(PROMPTS):
        model = choose.choice(models)
        if choose.random() < 0.5:
            model = load_lora_for_models(model, None, lora, choose.choice((0.3, 0.8)), 0)[0]
        if choose.random() < 0.3:
            model = model.clone()
            model.model_options["transformer_options"]["optimized_attention_override"] = override
        run = dict(
            width=choose.choice((64, 96, 128)),
            height=choose.choice((64, 160)),
            tokens=choose.choice((5, 16, 33)),
            batch=choose.choice((1, 1, 2, 3)),
        )
        with Counting() as counting:
            assert_parity(model, compiled(model), steps=1, seed=seed, **run)
        assert counting.breaks == 0
        graphs.append(counting.graphs)
    # Two kinds of blocks, with and without a patch, for one image, for the first other batch size, and for any.
    assert 8 <= sum(graphs) <= 12
    assert sum(graphs[PROMPTS // 2 :]) == 0
    del model, models
    comfy.model_management.unload_all_models()
    comfy.model_management.cleanup_models()
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
