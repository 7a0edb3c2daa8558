"""What is to know of the diffusers classes that load by a derived table: one file each.

`fixed` is what comfy/model_detection.py and comfy/ldm say for the class, by the names of diffusers' config; the first
value is the usual one.
"""
