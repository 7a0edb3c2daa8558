"""ComfyUI as one worker of many."""
