# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Your own Optax loop, step by step
#
# Write each part of a private training step yourself, and see what it does.

# %%
import matplotlib.pyplot as plt

print("hello")

# %% [markdown]
# ## A picture
#
# Here it is.

# %%
plt.plot([1, 2])
plt.show()
