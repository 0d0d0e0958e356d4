// SPDX-License-Identifier: Apache-2.0

package kind

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/plimsoll-bench/plimsoll/clusters/host"
	"github.com/plimsoll-bench/plimsoll/clusters/kind/engine"
)

// DefaultNodes is how many nodes the modes that kind carries everywhere have: direct twice, direct-conntrack, iptables, nftables and
// ebpf, and their four control planes.
const DefaultNodes = 10

// defaultProxies is on how many of them kube-proxy runs.
const defaultProxies = 4

// What a node takes, measured on one of our own image with an empty cluster.
const (
	nodeMemory  = 400 << 20 // bytes
	nodeDisk    = 600 << 20 // bytes
	NodeInotify = 12        // inotify instances of root: the kubelet's seven, systemd's three, containerd's two; kube-proxy's one is apart
)

// fewer is what to do where several modes stand side by side and the host has too little of something.
const fewer = "name fewer --modes where several stand side by side"

// Enough says in one line what the host lacks for so many nodes of an engine, on so many of which kube-proxy runs.
func Enough(ctx context.Context, e engine.Engine, nodes, proxies int) error {
	memory, err := host.AvailableMemory()
	if err != nil {
		return err
	}
	if want := uint64(nodes) * nodeMemory; want > memory {
		return fmt.Errorf("%d nodes want %.1f GiB of memory, %.1f are available: free some, or %s", nodes, gib(want), gib(memory), fewer)
	}
	root, err := e.Root(ctx)
	if err != nil {
		return err
	}
	var disk unix.Statfs_t
	if err := unix.Statfs(root, &disk); err != nil {
		return fmt.Errorf("where %s keeps containers, %s: %w", e.Kind, root, err)
	}
	if want, free := uint64(nodes)*nodeDisk, disk.Bavail*uint64(disk.Bsize); want > free {
		return fmt.Errorf("%d nodes want %.1f GiB of disk, %.1f are free in %s: free some, or %s", nodes, gib(want), gib(free), root, fewer)
	}
	// A node that gets none starts and fails in ways that nobody would trace to this.
	limit, used, err := Inotify()
	if err != nil {
		return err
	}
	if want := nodes*NodeInotify + proxies; want > limit-used {
		return fmt.Errorf("%d nodes want %d inotify instances, and of root's %d on this host %d are free: sysctl -w fs.inotify.max_user_instances=1024, or %s", nodes, want, limit, limit-used, fewer)
	}
	return nil
}

func gib(bytes uint64) float64 { return float64(bytes) / (1 << 30) }

// Inotify is how many inotify instances root may have on this host (inotify(7)), in all containers together, and how many it has.
func Inotify() (limit, used int, err error) {
	b, err := os.ReadFile("/proc/sys/fs/inotify/max_user_instances")
	if err != nil {
		return 0, 0, err
	}
	if limit, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
		return 0, 0, fmt.Errorf("fs.inotify.max_user_instances: %w", err)
	}
	// Instances are open files, counted for the user who opened them.
	files, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return 0, 0, err
	}
	for _, f := range files {
		target, err := os.Readlink(f)
		if errors.Is(err, fs.ErrNotExist) || target != "anon_inode:inotify" {
			continue // closed meanwhile, or something else
		}
		if owner, err := os.Stat(filepath.Dir(filepath.Dir(f))); err == nil && owner.Sys().(*syscall.Stat_t).Uid == 0 {
			used++
		}
	}
	return limit, used, nil
}
