"""gptcli: from text to a trained, evaluated, talking GPT.

Importing the package costs nothing; torch is loaded by the modules that compute.
"""

__version__ = "0.1.0"
