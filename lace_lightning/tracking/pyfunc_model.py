"""The code of a registered model: MLflow runs this file where the model is loaded ("models from code", no pickle)."""

from mlflow.models import set_model

from lace_lightning.tracking.group_model import GroupModel

set_model(GroupModel())
