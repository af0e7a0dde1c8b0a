"""Opens, loads, saves and describes frozen backbones."""
