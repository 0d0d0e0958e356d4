// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
)

// ErrOtherAgent is wrapped by Run's error where another agent is at work on the same cgroup, devices or pins.
var ErrOtherAgent = errors.New("another agent is on this node: end it first")

// locks are files that one agent at a time may hold: the kernel lets go of them when the process ends, however it does.
type locks struct {
	files []*os.File
	taken string // the network namespace, if somebody else holds its lock; empty: nobody does
}

// lockNode has this agent be the only one on its cgroup and its pins, and warns if it may not be in its devices' network namespace.
func lockNode(cfg Config) (_ locks, err error) {
	var held locks
	defer func() {
		if err != nil {
			err = errors.Join(err, held.close())
		}
	}()
	paths := map[string]string{"cgroup": cfg.Cgroup, "pin folder": cfg.LB.PinDir}
	if len(cfg.Devices) > 0 {
		if paths["network namespace"] = cfg.NetNS; cfg.NetNS == "" {
			paths["network namespace"] = "/proc/self/ns/net"
		}
	}
	for what, path := range paths {
		if path == "" {
			continue
		}
		file, err := os.Open(path)
		if errors.Is(err, os.ErrNotExist) {
			continue // who is to use it says so, or nobody was here yet
		}
		if err != nil {
			return held, fmt.Errorf("agent: %s: %w", what, err)
		}
		held.files = append(held.files, file)
		if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) && what == "network namespace" {
			// Any process there may hold this one, without rights: it is no reason to end, nor for bad health.
			held.taken = path
			klog.InfoS("The network namespace is locked: another agent may be at work there", "path", path)
		} else if errors.Is(err, unix.EWOULDBLOCK) {
			return held, fmt.Errorf("agent: %s %s: %w", what, path, ErrOtherAgent)
		} else if err != nil {
			return held, fmt.Errorf("agent: lock the %s %s: %w", what, path, err)
		}
	}
	return held, nil
}

func (l locks) close() error {
	var errs []error
	for _, file := range l.files {
		errs = append(errs, file.Close())
	}
	return errors.Join(errs...)
}

// Cleanup removes what agents with this configuration left on the node: pins, the nftables table and the snapshot. It does nothing while
// one of them is at work, which ErrOtherAgent says. What is not there is none to remove.
func Cleanup(cfg Config) error {
	cfg.Cgroup, cfg.Devices = "", []string{"*"} // the table is of the network namespace, whatever the devices were
	held, err := lockNode(cfg)
	if err != nil {
		return err
	}
	err = lb.Cleanup(cfg.LB.PinDir, cfg.NetNS)
	if cfg.Snapshot != "" {
		if gone := os.Remove(cfg.Snapshot); !errors.Is(gone, os.ErrNotExist) {
			err = errors.Join(err, gone)
		}
	}
	return errors.Join(err, held.close())
}
