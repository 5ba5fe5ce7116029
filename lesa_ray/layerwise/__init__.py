"""Layer-wise scaling: Llama-style models whose layers differ in FFN width and query heads.

profiles (what each layer gets) ▸ budget (how much, so that the total is met) ▸ settings ▸ folder (config.json and the
model's own code) ▸ `lesa-ray pretrain --architecture`. The model itself is `modeling_layerwise_llama`."""
