"""Model files: single files, diffusers folders, hub ids, and loading of the frozen networks.

Use of the networks belongs in encode/, loading of networks to train in train/networks/.
"""
