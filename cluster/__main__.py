"""`python -m cluster COMMAND`: the manifests of k8s/ and what they started, by way of kubectl."""

import sys

from cluster.commands import run_command

COMMANDS = {
    "doctor": ("cluster.doctor:doctor", "what would keep an overlay from running on this cluster, and what to do"),
    "render": ("cluster.manifests:render", "show what apply would send: render STAGE --overlay gpu"),
    "apply": ("cluster.manifests:apply", "apply a stage: platform, prepare, train, merge, evaluate, serve"),
    "wait": ("cluster.following:wait", "follow a job to its end, with its output: wait train"),
    "status": ("cluster.following:status", "what runs, what has ended, what waits and for what"),
    "rollout": ("cluster.rollouts:rollout", "serve another model, if its evaluation lets it: rollout /store/models/v2"),
    "rollback": ("cluster.rollouts:rollback", "serve the model before it again"),
}

if __name__ == "__main__":
    sys.exit(run_command("python -m cluster", COMMANDS, sys.argv[1:]))
