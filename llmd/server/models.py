"""The routes /v1/models and /v1/models/{id}: which names are served here, and how long a context they allow."""

import hashlib
import time

from quart import Response

from llmd.server.context import Server
from llmd.server.openai_responses import ModelCard, ModelList, ModelPermission
from llmd.server.parameters import check_model
from llmd.server.responses import json_response

# of the process: a model has no other date here
_CREATED = int(time.time())


async def list_models(server: Server) -> Response:
    """GET /v1/models. Answers while the model still loads, with `max_model_len` null."""
    return json_response(ModelList(data=[_card(server, name) for name in server.config.model.served_names]))


async def get_model(server: Server, model_id: str) -> Response:
    """GET /v1/models/{id}; the id may hold slashes."""
    check_model(model_id, server.config.model.served_names)
    return json_response(_card(server, model_id))


def _card(server: Server, name: str) -> ModelCard:
    names = server.config.model.served_names
    permission_id = "modelperm-" + hashlib.sha256(name.encode()).hexdigest()[:24]
    return ModelCard(
        id=name if name in names else names[0],
        created=_CREATED,
        root=server.config.model.source or names[0],
        max_model_len=server.text.max_model_len if server.text is not None else None,
        permission=[ModelPermission(id=permission_id, created=_CREATED)],
    )
