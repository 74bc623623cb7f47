"""Deployments without sockets: configurations, and groups that are nothing but their decision core."""

import numpy as np

from brproxy.config import parse_config
from brproxy.deployment import Deployment, join
from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.fleet import Fleet, Group
from brproxy.ledger import Ledger
from brproxy.plans import by_group
from brproxy.prediction.predictor import make_predictor
from brproxy.roster import Roster
from brproxy.routing.policy import make_policy


def config_of(*workers, **tables):
    return parse_config({"worker": list(workers)} | tables, "x.toml")


def worker(name, port=None, **more):
    return {"name": name, "url": f"http://{name}:{port or 80}"} | more


class Making:
    """See deployment.Making: groups of nothing but their decision core; one that is ended only retires."""

    def __init__(self):
        self.fleet = Fleet([])
        self.settled = []
        self.reached = []
        self.ended = []
        self.made_of = {}

    def settle(self, config):
        self.settled.append(config)

    def begin(self, config, workers):
        names = dict.fromkeys(worker.barrier_group for worker in workers)
        made = [self.group(name, [w for w in workers if w.barrier_group == name]) for name in names]
        for group in made:
            self.fleet.add(group)
        return made

    def group(self, name, workers):
        parts = make_policy("least-kv"), make_predictor("survival"), np.random.default_rng(0), PoolLimits()
        dispatcher = Dispatcher(Ledger(Roster(checked=False)), *parts)
        first = workers[0]
        group = Group(name, first.models, dispatcher, first.role == "prefill", first.group)
        self.made_of[group] = first.engine, first.role != "both" and first.handover
        return group

    def end(self, groups):
        for group in groups:
            self.fleet.retire(group)
        self.ended += groups

    def reach(self, worker):
        self.reached.append(worker)

    def forget(self, workers):
        pass


def deployment_of(config):
    making = Making()
    for workers in by_group(config.worker).values():
        for group in making.begin(config, workers):
            for each in workers:
                if each.barrier_group == group.name:
                    join(group.roster, each)
    return Deployment(config, making.fleet, making)


def kinds(changes):
    return [(step.kind, step.worker.label) for step in changes.steps]


def all_members(deployment):
    return [(group, member) for group in deployment._groups.values() for member in group.roster.members]


def the(deployment, name):
    (member,) = deployment.find(name)[1]
    return member
