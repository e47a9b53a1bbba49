"""What a model is: layouts of files, file names, safetensors headers. Pure."""
