// SPDX-License-Identifier: Apache-2.0

package kind

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
)

// Note: on hosts that mount cgroup2 beside cgroup v1, folders of the provider's own were tried, into which a node's processes were
// moved. The node's systemd moved pods out again. It is not needed: runc 1.1 or newer gives a container a cgroup2 folder on such
// hosts too, and the node's systemd and runc keep all of the node below it.

// nodeCgroup is the cgroup2 folder that holds all processes of a node and nothing else: its container's own.
func nodeCgroup(pid int) (*host.Cgroup, error) {
	path, err := cgroup2Of(pid)
	if err != nil {
		return nil, err
	}
	// The node's first process may have gone down into a folder of its own by now.
	path = strings.TrimSuffix(path, "/init.scope")
	if path == "" || path == "/" {
		return nil, fmt.Errorf("the engine gave the node no cgroup2 folder of its own, and the root one holds the whole host; an engine with runc 1.1 or newer does: %w", clusters.ErrNotSupported)
	}
	return below(path)
}

// below is the folder at a path of the cgroup2 hierarchy.
func below(path string) (*host.Cgroup, error) {
	root, err := clusters.Cgroup2Mount()
	return &host.Cgroup{Dir: filepath.Join(root, path)}, err
}

// Parts of a node that are neither the control plane nor a proxy nor a pod that traffic runs between, as folders below its cgroup:
// systemd's own layout, with the kubelet where kind places it.
const (
	initPart    = "init.scope"
	systemPart  = "system.slice"
	kubeletPart = "kubelet.slice/kubelet.service"
)

// cgroup2Of is a process's folder in the cgroup2 hierarchy (cgroups(7)).
func cgroup2Of(pid int) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok {
			return path, nil
		}
	}
	return "", fmt.Errorf("process %d is in no cgroup2: %w", pid, clusters.ErrNotSupported)
}

// container is the first process of a pod's first container, and its cgroup.
func container(p *corev1.Pod) (pid int, group *host.Cgroup, err error) {
	if len(p.Status.ContainerStatuses) == 0 {
		return 0, nil, fmt.Errorf("pod %s has no container yet", p.Name)
	}
	_, id, ok := strings.Cut(p.Status.ContainerStatuses[0].ContainerID, "://")
	if !ok {
		return 0, nil, fmt.Errorf("pod %s has no container yet", p.Name)
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, nil, err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		// Every runtime makes the container's id part of its cgroup's name. A process that has ended meanwhile is not it.
		if path, err := cgroup2Of(pid); err == nil && strings.Contains(path, id) {
			group, err := below(path)
			return pid, group, err
		}
	}
	return 0, nil, fmt.Errorf("pod %s: no process of container %s is on this host: is the engine on another one?", p.Name, id)
}
