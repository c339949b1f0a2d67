"""Adapter files of image and video models: kohya sd-scripts, LyCORIS, diffusers, OneTrainer, ai-toolkit, musubi-tuner, …"""
