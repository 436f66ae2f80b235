"""Reads the archive of an offline experiment of Comet."""

import json
import zipfile


class Archive:
    """What is in it: name, key, project, graph, tags, params, metrics, images, …"""

    def __init__(self, path):
        self.metrics = {}  # name: [(step, epoch, value), ...] as logged
        self.params = {}
        self.images = []  # (name, step, data), ... as logged
        self.assets = {}  # file name: data
        self.matrices = []  # confusion matrices, as Comet stores them
        self.name = self.graph = None
        with zipfile.ZipFile(path) as archive:
            about = json.loads(archive.read("experiment.json"))
            self.key, self.project = about["offline_id"], about["project_name"]
            self.tags = about["tags"]
            for line in archive.read("messages.json").decode().splitlines():
                message = json.loads(line)
                self.take(archive, message["type"], message["payload"])

    def take(self, archive, kind, content):
        """Take one of the archive's messages."""
        if kind == "metric_msg":
            metric = content["metric"]
            entry = metric["step"], metric["epoch"], float(metric["metricValue"])
            self.metrics.setdefault(metric["metricName"], []).append(entry)
        elif kind == "parameter_msg":
            self.params[content["param"]["paramName"]] = content["param"]["paramValue"]
        elif kind == "log_other" and content["key"] == "Name":
            self.name = content["value"]
        elif kind == "graph":
            self.graph = content["graph"]
        elif kind == "file_upload" and content["upload_type"] == "visualization":
            about = content["additional_params"]
            data = archive.read(content["file_path"])
            self.images.append((about["figName"], about["step"], data))
        elif kind == "file_upload" and content["upload_type"] == "asset":
            name = content["additional_params"]["fileName"]
            self.assets[name] = archive.read(content["file_path"])
        elif kind == "file_upload" and content["upload_type"] == "confusion-matrix":
            self.matrices.append(json.loads(archive.read(content["file_path"])))
