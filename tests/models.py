"Small models of every family, in shapes that hurt."
from llm_workbench.families.families import SMALL, small_model  # noqa: F401
