// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
	"github.com/plimsoll-bench/plimsoll/clusters/kind"
	"github.com/plimsoll-bench/plimsoll/clusters/kind/engine"
)

// examineKind says what stands in the way of kind clusters. None of it ends a run: without them there is the lab.
func examineKind(ctx context.Context) []finding {
	found := finding{"container engine", note, "", ""}
	e, err := engine.Find(ctx)
	switch {
	case err != nil:
		found.detail = err.Error() + "; the lab needs none"
	case e.Own:
		found.state, found.detail = has, e.Kind+", the one that make kind-engine started"
	default:
		found.state, found.detail = has, e.Kind
	}

	image := finding{"node image", note, "", ""}
	cache, err := host.CacheDir()
	if err == nil {
		var name string
		if name, err = kind.OwnArchive(cache); err == nil {
			image.state, image.detail = has, name
		}
	}
	if err != nil {
		image.detail = err.Error() + "; an engine with a way to a registry uses kind's own"
	}

	inotify := finding{"inotify", unknown, "", ""}
	if limit, used, err := kind.Inotify(); err != nil {
		inotify.detail = err.Error()
	} else {
		inotify.state, inotify.detail = has, fmt.Sprintf("%d of root's %d instances are in use", used, limit)
		if nodes := (limit - used) / kind.NodeInotify; nodes < kind.DefaultNodes {
			inotify.state = note
			inotify.detail += fmt.Sprintf(": enough for %d nodes of kind, the default modes want %d (sysctl fs.inotify.max_user_instances)", nodes, kind.DefaultNodes)
		}
	}

	group := finding{"cgroup2 of nodes", has, "a container's own folder below ", ""}
	mount, err := clusters.Cgroup2Mount()
	if err != nil {
		group.state, group.detail = unknown, err.Error()
	} else {
		group.detail += mount
		if mount != "/sys/fs/cgroup" {
			group.state = note
			group.detail += ", which is mounted beside cgroup v1: wants an engine with runc 1.1 or newer"
		}
	}
	return []finding{found, image, inotify, group}
}
