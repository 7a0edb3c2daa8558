"""Everything of ComfyUI that this pack leans on: names, how they are called, and what is expected of what they return.

One `Feature` is one part of the pack that stops working when something of it is gone; the rest works on. Checked at
first use by check.py, and of any ComfyUI tree without running it by `python3 dev.py drift`. A test holds this list
against the code in this folder, so that nothing is leaned on that is not here.

How a line is read:
    comfy.sd:load_diffusion_model_state_dict(sd, model_options=, disable_dynamic=)   a call with these arguments binds
    comfy.sd:VAE.decode(self, latent)                          so does this one of a method
    comfy.model_patcher:ModelPatcher->backup                   what it makes has this attribute
    comfy.ops:mixed_precision_ops()>Linear._forward(self, x, weight, bias)   of the class that this function returns
    comfy.ops:linear_input_act ?                               wanted where it is there; nothing stops without it
"""

from __future__ import annotations

from typing import NamedTuple

from .texts import Text


class Feature(NamedTuple):
    """A part of the pack: what does not work without it, and what of the host it needs."""

    stops: str
    touches: tuple[str, ...]


_PATCHER = "comfy.model_patcher:ModelPatcher"
_LINEAR = "comfy.ops:mixed_precision_ops()>Linear"
_EMBEDDING = "comfy.ops:mixed_precision_ops()>Embedding"

FEATURES = {
    "devices": Feature(Text("this pack cannot tell which device ComfyUI runs models on, so nothing can be loaded"), (
        "comfy.model_management:get_torch_device()",
        "comfy.model_management:get_torch_device_name(device)",
        "comfy.model_management:is_device_cpu(device)",
        "comfy.model_management:is_oom(error) ?",
        "comfy.model_management:get_all_torch_devices() ?",
    )),
    "memory": Feature(Text("the forms of a model are not ordered by what fits on this machine"), (
        "comfy.model_management:get_total_memory(device)",
    )),
    "memory estimates": Feature(Text("nodes do not say how much memory a model is going to take"), (
        "comfy.model_management:unet_dtype(model_params=, weight_dtype=)",
    )),
    "matmuls": Feature(
        Text("native FP8, NVFP4 and MXFP8 matmuls are taken as missing, so those layers count as emulated"), (
        "comfy.model_management:supports_fp8_compute(device)",
        "comfy.model_management:supports_nvfp4_compute(device)",
        "comfy.model_management:supports_mxfp8_compute(device)",
        "comfy.model_management:supports_int8_compute(device) ?",
    )),
    "progress": Feature(Text("progress bars of this pack's nodes stand still, and Cancel waits until a node is done"), (
        "comfy.utils:ProgressBar(total)",
        "comfy.utils:ProgressBar.update(self, amount)",
        "comfy.utils:ProgressBar.update_absolute(self, done, total, preview)",
        "comfy.model_management:processing_interrupted()",
        "comfy.model_management:throw_exception_if_processing_interrupted()",
    )),
    "folders": Feature(Text("models are found only by their full paths, not in ComfyUI's model folders"), (
        "folder_paths:add_model_folder_path(key, path)",
        "folder_paths:models_dir",
        "folder_paths:folder_names_and_paths",
        "folder_paths:cache_helper ?",
        "folder_paths:CacheHelper.get(self, name) ?",
        "folder_paths:CacheHelper.set(self, name, value) ?",
    )),
    "output folder": Feature(Text("this pack's save and build nodes cannot tell where to write"), (
        "folder_paths:get_output_directory()",
    )),
    "transformers": Feature(Text("transformers cannot be loaded"), (
        "comfy.utils:load_torch_file(path)",
        "comfy.sd:load_diffusion_model_state_dict(sd, model_options=, disable_dynamic=)",
        f"{_PATCHER}->model",
        f"{_PATCHER}->cached_patcher_init",
        f"{_PATCHER}.set_attachments(self, key, value)",
        f"{_PATCHER}.get_attachment(self, key)",
        f"{_PATCHER}.set_model_compute_dtype(self, dtype)",
        "comfy.supported_models_base:BASE.process_unet_state_dict(self, sd)",
        "comfy.model_base:BaseModel->model_config",
        "comfy.model_base:BaseModel->model_type",
        "comfy.model_base:BaseModel->diffusion_model",
        "comfy.model_base:BaseModel.get_dtype(self)",
        "comfy.model_base:BaseModel.get_dtype_inference(self)",
    )),
    "deferred transformers": Feature(Text("'weights: defer to override' does not work; set weights to 'load'"), (
        "comfy.model_base:model_sampling(config, kind)",
        f"{_PATCHER}.set_model_patch(self, patch, name)",
        f"{_PATCHER}.model_patches_to(self, device)",
    )),
    "native passthrough": Feature(Text("of single files only models that this pack has tables for can be loaded"), (
        "comfy.model_detection:model_config_from_unet(sd, prefix, metadata=)",
        "comfy.ops:disable_weight_init",
        "comfy.supported_models_base:BASE.get_model(self, sd, prefix)",
        "comfy.supported_models_base:BASE.set_inference_dtype(self, dtype, manual_cast_dtype)",
        "comfy.supported_models_base:BASE->unet_config",
        "comfy.supported_models_base:BASE.custom_operations",
    )),
    "UNets in diffusers' names": Feature(Text("UNets of Stable Diffusion in diffusers' names cannot be loaded"), (
        "comfy.utils:unet_to_diffusers(unet_config)",
    )),
    "whole checkpoints": Feature(Text("text encoders and VAE of an all-in-one file cannot be loaded"), (
        "comfy.model_detection:unet_prefix_from_state_dict(sd)",
        "comfy.model_detection:model_config_from_unet(sd, prefix, metadata=)",
        "comfy.supported_models_base:BASE.vae_key_prefix",
        "comfy.supported_models_base:BASE.process_vae_state_dict(self, sd)",
        "comfy.supported_models_base:BASE.process_clip_state_dict(self, sd)",
        "comfy.utils:state_dict_prefix_replace(sd, prefixes, filter_keys=)",
        "comfy.sd:load_state_dict_guess_config(sd, output_vae=, output_model=, embedding_directory=, "
        "te_model_options=, metadata=, disable_dynamic=)",
        "folder_paths:get_folder_paths(key)",
    )),
    "quantized layers": Feature(Text("quantized transformers cannot be loaded; plain ones can"), (
        "comfy.model_detection:model_config_from_unet(sd, prefix)",
        "comfy.model_management:unet_manual_cast(weight_dtype, device, dtypes)",
        "comfy.ops:mixed_precision_ops(config, dtype)",
        "comfy.ops:pick_operations(weight_dtype, compute_dtype, load_device=, model_config=)",
        f"{_LINEAR}._load_from_state_dict",
        f"{_LINEAR}._forward(self, x, weight, bias)",
        f"{_LINEAR}.forward(self, x)",
        f"{_LINEAR}.forward_comfy_cast_weights(self, x, dtype, weight_only_quant=)",
        f"{_LINEAR}.convert_weight(self, weight, inplace=)",
        f"{_LINEAR}.set_weight(self, weight, inplace_update=, seed=, return_weight=)",
        f"{_LINEAR}.state_dict",
        f"{_LINEAR}->factory_kwargs",
        f"{_LINEAR}->_orig_shape",
        f"{_LINEAR}._disabled_formats",
        f"{_LINEAR}->_full_precision_mm",
        f"{_LINEAR}->_full_precision_mm_config",
        "comfy.quant_ops:QUANT_ALGOS",
        "comfy_kitchen.tensor:QuantizedTensor.from_float",
        "comfy_kitchen.tensor:QuantizedTensor.dequantize(self)",
        "comfy_kitchen.tensor:QuantizedTensor.state_dict",
        "comfy_kitchen.tensor:QuantizedTensor.layout_cls",
        "comfy_kitchen.tensor:dequantize_args(args)",
        "comfy_kitchen.tensor:register_layout_class(name, layout)",
        "comfy_kitchen.tensor:register_layout_op(operation, layout)",
        "comfy_kitchen.tensor:get_layout_class(name)",
        "comfy_kitchen.tensor:BaseLayoutParams",
        "comfy_kitchen.tensor:QuantizedLayout",
        "comfy_kitchen.float_utils:to_blocked",
        "comfy_kitchen.float_utils:from_blocked",
        "comfy_kitchen:dequantize_nvfp4",
        "comfy_kitchen:dequantize_per_tensor_fp8",
        "comfy_kitchen:quantize_per_tensor_fp8",
        "comfy_kitchen:scaled_mm_nvfp4",
        "comfy_kitchen.scaled_mm_v2:scaled_mm_v2",
        "comfy_kitchen:list_backends",
        "comfy_kitchen:use_backend(name) ?",
        "comfy.ops:linear_input_act ?",
        "comfy.ops:run_every_op() ?",
        "comfy_kitchen:quantize_int8_rowwise ?",
        "comfy.ops:cast_bias_weight(module, dtype=, device=, bias_dtype=, offloadable=, compute_dtype=, want_requant=)",
        "comfy.ops:uncast_bias_weight(module, weight, bias, stream)",
        f"{_LINEAR}->weight_function",
        f"{_LINEAR}->bias_function",
    )),
    "SVDQuant": Feature(Text("Nunchaku's SVDQuant transformers cannot be loaded"), (
        "comfy_kitchen.tensor:TensorCoreSVDQuantW4A4Layout",
        "comfy_kitchen.tensor:TensorCoreAWQW4A16Layout",
    )),
    "LoRA beside the weight": Feature(Text("LoRAs do not work on quantized transformers"), (
        "comfy.lora:calculate_weight(patches, weight, key, intermediate_dtype=, original_weights=)",
        "comfy.patcher_extension:CallbacksMP.ON_LOAD",
        "comfy.patcher_extension:CallbacksMP.ON_APPLY_HOOKS",
        f"{_PATCHER}.add_callback_with_key(self, kind, key, callback)",
        f"{_PATCHER}.remove_callbacks_with_key(self, kind, key)",
        f"{_PATCHER}.patch_weight_to_device(self, key, device_to=, return_weight=)",
        f"{_PATCHER}.patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, "
        "memory_counter)",
        f"{_PATCHER}.get_combined_hook_patches(self, hooks)",
        f"{_PATCHER}->current_hooks",
        f"{_PATCHER}->patches_uuid",
        f"{_PATCHER}.is_dynamic(self)",
        f"{_PATCHER}.loaded_size(self)",
        f"{_PATCHER}->hook_backup",
        f"{_PATCHER}->patches",
    )),
    "LoRAs in diffusers' names": Feature(Text("Load LoRA for Transformer does not work; use ComfyUI's LoRA nodes"), (
        "comfy.lora:model_lora_keys_unet(model, names)",
        "comfy.sd:load_lora_for_models(model, clip, lora, strength_model, strength_clip)",
        "comfy.weight_adapter:LoRAAdapter.load(name, tensors, alpha, dora_scale, read)",
        "folder_paths:get_filename_list(key)",
        "folder_paths:get_full_path(key, name)",
    )),
    "Ascend": Feature(Text("ModelSlim transformers and Ascend MXFP8 Quantize do not work"), (
        "comfy_kitchen:mm_int8",
        *(f"comfy_kitchen.tensor:TensorWiseINT8Layout.{name}" for name in (
            "Params", "quantize", "dequantize", "get_plain_tensors", "state_dict_tensors", "requantize_kwargs")),
        "comfy_kitchen.tensor:TensorCoreMXFP8Layout",
    )),
    "overrides": Feature(Text("Apply Transformer Override and Ascend MXFP8 Quantize do not work"), (
        f"{_PATCHER}.clone(self, model_override=)",
        f"{_PATCHER}.get_clone_model_override(self)",
        f"{_PATCHER}.model_state_dict(self)",
        f"{_PATCHER}.is_dynamic(self)",
        *(f"{_PATCHER}->{name}" for name in (
            "patches", "object_patches", "injections", "model_options", "attachments", "load_device", "offload_device",
            "clone_base_uuid", "hook_backup", "backup", "backup_buffers")),
        *(f"{_PATCHER}->{name} ?" for name in ("size", "parent", "cached_hook_patches", "fast_disk")),  # only set
        f"{_PATCHER}.use_ejected(self)",
        "comfy.model_base:BaseModel.state_dict_for_saving(self, tensors)",
        "comfy.quant_ops:QuantizedTensor",
    )),
    "saving": Feature(Text("Save Quantized Model does not work; ComfyUI's own save nodes may"), (
        "comfy.model_management:load_models_gpu(models)",
        f"{_PATCHER}.patch_weight_to_device(self, key, device_to=, return_weight=)",
        f"{_PATCHER}.get_model_object(self, name)",
        "comfy.model_base:BaseModel.state_dict_for_saving(self, tensors)",
        f"{_PATCHER}->backup",
        f"{_PATCHER}->backup_buffers",
        f"{_PATCHER}->patches",
    )),
    "comparing": Feature(Text("Compare Models does not work"), (
        "comfy.samplers:KSampler.SAMPLERS",
        "comfy.samplers:KSampler.SCHEDULERS",
        "comfy.sample:fix_empty_latent_channels(model, latent, spacial, temporal)",
        "comfy.sample:prepare_noise(latent, seed, indices)",
        "comfy.sample:sample(model, noise, steps=, cfg=, sampler_name=, scheduler=, positive=, negative=, "
        "latent_image=, noise_mask=, callback=, disable_pbar=, seed=)",
        "comfy.utils:PROGRESS_BAR_ENABLED",
        "latent_preview:prepare_callback(model, steps)",
    )),
    "keeping decoded weights": Feature(Text("Keep Weights Decoded does not work"), (
        "comfy.patcher_extension:WrappersMP.OUTER_SAMPLE",
        "comfy.patcher_extension:WrappersMP.PREDICT_NOISE",
        "comfy.patcher_extension:add_wrapper_with_key(kind, key, wrapper, options, is_model_options=)",
        f"{_PATCHER}.add_wrapper_with_key(self, kind, key, wrapper)",
        f"{_PATCHER}.remove_wrappers_with_key(self, kind, key)",
        "comfy.samplers:CFGGuider->model_patcher",
        "comfy.samplers:CFGGuider->model_options",
        "comfy.model_management:get_free_memory(device)",
        "comfy.model_management:get_total_memory(device)",
        "comfy.model_management:minimum_inference_memory()",
        "comfy.model_management:extra_reserved_memory()",
        "comfy.model_management:soft_empty_cache()",
    )),
    "measuring": Feature(Text("the command `bench` does not work"), (
        f"{_PATCHER}.get_model_object(self, name)",
        f"{_PATCHER}.loaded_size(self)",
        f"{_PATCHER}.model_size(self)",
        f"{_PATCHER}.is_dynamic(self)",
        *(f"comfy.latent_formats:LatentFormat->{name}" for name in (
            "latent_channels", "latent_dimensions", "spacial_downscale_ratio", "temporal_downscale_ratio")),
        "comfy.model_management:unload_all_models()",
        "comfy.model_management:soft_empty_cache()",
    )),
    "dynamic VRAM": Feature(Text("the command `bench` measures without ComfyUI's dynamic VRAM"), (
        "comfy.cli_args:args",
        "comfy.cli_args:enables_dynamic_vram()",
        "comfy.model_management:is_nvidia()",
        "comfy.model_management:is_wsl()",
        "comfy.model_management:get_all_torch_devices()",
        "comfy.model_patcher:CoreModelPatcher",
        "comfy.model_patcher:ModelPatcherDynamic",
        "comfy.memory_management:aimdo_enabled",
    )),
    "text encoders": Feature(Text("Load Base Text Encoder does not work; use ComfyUI's CLIP loaders"), (
        "comfy.sd:load_text_encoder_state_dicts(sds, embedding_directory=, clip_type=, model_options=, "
        "disable_dynamic=)",
        "comfy.sd:CLIPType",
        "comfy.sd:CLIP->cond_stage_model",
        "comfy.sd:CLIP->tokenizer",
        "comfy.sd:CLIP->patcher",
        "comfy.sd1_clip:SDTokenizer->tokenizer",
        "comfy.sd1_clip:SDTokenizer->pad_token",
        *(f"comfy.sd1_clip:SDClipModel->{name}" for name in ("layer", "layer_idx", "options_default",
                                                            "return_projected_pooled")),
        "folder_paths:get_folder_paths(key)",
    )),
    "quantized text encoders": Feature(Text("quantized text encoders cannot be loaded; plain ones can"), (
        "comfy.ops:mixed_precision_ops(config, dtype, full_precision_mm=)",
        f"{_EMBEDDING}._load_from_state_dict",
        f"{_EMBEDDING}.state_dict",
        f"{_EMBEDDING}.forward_comfy_cast_weights(self, x, out_dtype=)",
        f"{_EMBEDDING}->num_embeddings",
        f"{_EMBEDDING}->embedding_dim",
        f"{_EMBEDDING}->weight_function ?",
    )),
    "FLUX.2's tokenizer": Feature(
        Text("FLUX.2's text encoder cannot be loaded from a base; use ComfyUI's CLIP loader"), (
        "comfy.text_encoders.flux:load_mistral_tokenizer(data)",
        "comfy.text_encoders.flux:MistralTokenizerClass.from_pretrained(path, tokenizer_object=)",
        "comfy.text_encoders.flux:Mistral3Tokenizer",
    )),
    "mT5's tokenizer": Feature(
        Text("Hunyuan-DiT's text encoders cannot be loaded from a base; use a whole checkpoint"), (
        "comfy.text_encoders.long_clipl:model_options_long_clip(sd, tokenizer_data, model_options)",
        "comfy.text_encoders.hydit:HyditTokenizer(tokenizer_data=)",
    )),
    "VAEs": Feature(Text("Load Base VAE does not work; use ComfyUI's VAE loader"), (
        "comfy.sd:VAE(sd=, dtype=, metadata=)",
        *(f"comfy.sd:VAE->{name}" for name in ("first_stage_model", "patcher", "size", "vae_dtype", "working_dtypes",
                                              "latent_channels")),
        "comfy.sd:VAE.model_size(self)",
        "comfy.sd:VAE.decode(self, latent)",
        "comfy.diffusers_convert:convert_vae_state_dict(sd)",
        "comfy.latent_formats:LatentFormat.process_out(self, latent)",
        "comfy.ldm.lightricks.vae.causal_video_autoencoder:VideoVAE(config=)",
        "comfy.ldm.wan.vae:WanVAE",
        "comfy.ldm.wan.vae2_2:WanVAE",
        "comfy.ldm.models.autoencoder:AutoencoderKL(ddconfig=, decoder_ddconfig=, embed_dim=)",
        "comfy.ldm.models.autoencoder:AutoencodingEngine(regularizer_config=, encoder_config=, decoder_config=)",
        "comfy.ldm.models.autoencoder:DiagonalGaussianRegularizer",
        "comfy.model_management:archive_model_dtypes(model)",
        "comfy.model_patcher:CoreModelPatcher(model, load_device=, offload_device=)",
        f"{_PATCHER}.get_free_memory(self, device)",
    )),
    "nodes": Feature(Text("this pack's nodes do not appear at all"), (
        "comfy_api.latest:ComfyExtension.get_node_list",
        "comfy_api.latest:ComfyExtension.on_load",
        *(f"comfy_api.latest:io.{name}" for name in (
            "ComfyNode", "Schema", "NodeOutput", "Model", "Clip", "Vae", "Image", "Latent", "Conditioning", "String",
            "Combo", "Int", "Float", "Boolean", "Custom")),
        "comfy_api.latest:ui.PreviewImage",
        "comfy_api.latest:ui.PreviewText",
    )),
    "words on nodes": Feature(Text("nodes that wait for a server do not say for what, or how long"), (
        "server:PromptServer->instance",
        "server:PromptServer->client_id",
        "server:PromptServer.send_progress_text(self, text, node_id, sid)",
        "comfy_execution.utils:get_executing_context()",
    )),
    "videos": Feature(Text("Server Video cannot hand on what a server makes"), (
        "comfy_api.latest:io.Video",
        "comfy_api.latest:InputImpl.VideoFromFile(file)",
        "comfy_api.latest:InputImpl.VideoFromComponents(components)",
        "comfy_api.latest:Types.VideoComponents(images=, frame_rate=)",
        "comfy_api.latest:VideoFromFile.get_dimensions(self)",
        "comfy_api.latest:VideoFromFile.get_frame_count(self)",
        "comfy_api.latest:VideoFromFile.get_frame_rate(self)",
        "comfy_api.latest:VideoFromFile.save_to(self, path)",
    )),
    "checks before the queue": Feature(
        Text("a prompt is checked node by node only; what does not fit fails when it runs"), (
        "server:PromptServer->instance",
        "server:PromptServer.add_on_prompt_handler(self, handler)",
        "server:nodes.NODE_CLASS_MAPPINGS",
        "comfy_api.latest:io.Hidden",
    )),
    "web routes": Feature(
        Text("badges, the checkpoint browser and downloads in the browser do not work; the nodes do"), (
        "server:PromptServer->instance",
        "server:PromptServer->routes",
        "comfy.cli_args:args.enable_cors_header",
    )),
}
