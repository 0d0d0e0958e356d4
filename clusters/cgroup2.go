// SPDX-License-Identifier: Apache-2.0

package clusters

import (
	"fmt"
	"io"
	"os"

	"github.com/moby/sys/mountinfo"
)

// Cgroup2Mount is where this host mounts cgroup2: /sys/fs/cgroup on most hosts, a folder below it on mixed ones. The error
// wraps ErrNotSupported when it is mounted nowhere.
func Cgroup2Mount() (string, error) { return Cgroup2MountOf(os.Getpid()) }

// Cgroup2MountOf is where a process sees cgroup2, which may be elsewhere in a mount namespace of its own.
func Cgroup2MountOf(pid int) (string, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return "", err
	}
	defer f.Close()
	return cgroup2Mount(f)
}

// cgroup2Mount reads a mountinfo (proc(5)).
func cgroup2Mount(mounts io.Reader) (string, error) {
	found, err := mountinfo.GetMountsFromReader(mounts, mountinfo.FSTypeFilter("cgroup2"))
	if err != nil {
		return "", fmt.Errorf("read the mounts: %w", err)
	}
	if len(found) == 0 {
		return "", fmt.Errorf("no cgroup2 file system is mounted (mount -t cgroup2 none DIR): %w", ErrNotSupported)
	}
	return found[0].Mountpoint, nil
}
