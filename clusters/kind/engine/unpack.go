// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plimsoll-bench/plimsoll/clusters/host"
)

// packages are what the engine is made of. What they depend on and the host has not is unpacked with them.
//
// Note: Docker 20.10, Debian 12's, was tried: its --privileged asks for every capability that the kernel knows and fails where
// root's bounding set lacks one. podman takes the set as it is, and has no daemon that rewrites the host's rules. Note: crun, its
// usual runtime, refuses hosts that mount cgroup2 with controllers beside cgroup v1; runc does not.
var packages = []string{"podman", "runc", "conmon", "netavark", "aardvark-dns", "iptables"}

// unpack brings the packages into a folder of cache, once for each release of the distribution, and returns it. Nothing is
// installed: maintainer scripts do not run, and the host's package lists stay as they are.
func unpack(ctx context.Context, cache string, report func(string)) (dir string, err error) {
	release, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(append(release, strings.Join(packages, " ")...))
	dir = filepath.Join(cache, "engine-"+hex.EncodeToString(sum[:6]))
	stamp := filepath.Join(dir, "unpacked")
	if _, err := os.Stat(stamp); err == nil {
		return dir, nil
	}
	report("unpacking a container engine: " + strings.Join(packages, ", "))
	shelf, err := host.NewShelf(ctx, dir)
	if err != nil {
		return "", fmt.Errorf("%w; with Docker or podman installed none is unpacked", err)
	}
	if err := errors.Join(shelf.UnpackWhole(ctx, packages...), shelf.Close()); err != nil {
		return "", err
	}
	return dir, os.WriteFile(stamp, nil, 0o644)
}

// writeConfiguration writes podman's configuration into the unpacked /etc. Containers and images are kept in the cache.
func writeConfiguration(dir string) error {
	etc := filepath.Join(dir, "root", "etc", "containers")
	store := filepath.Join(dir, "store")
	// kind shows nodes the kernel's modules, also where there are none.
	for _, d := range []string{etc, store, filepath.Join(dir, "root/usr/lib/modules")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	limits, err := ulimits()
	if err != nil {
		return err
	}
	for name, content := range map[string]string{
		"containers.conf": fmt.Sprintf(`[containers]
log_driver = "k8s-file"
default_ulimits = [%s]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
runtime = "runc"
[network]
network_backend = "netavark"
network_config_dir = %q
`, limits, filepath.Join(store, "networks")),
		"storage.conf": fmt.Sprintf("[storage]\ndriver = \"overlay\"\ngraphroot = %q\nrunroot = \"/run/containers/storage\"\n", store),
		"policy.json":  `{"default": [{"type": "insecureAcceptAnything"}]}` + "\n",
		// Images come from files alone.
		"registries.conf": "unqualified-search-registries = []\n",
	} {
		if err := os.WriteFile(filepath.Join(etc, name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// ulimits are this process's own hard limits, as podman writes them: podman's defaults are higher than what root may set where it
// lacks CAP_SYS_RESOURCE.
func ulimits() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/pid_max")
	if err != nil {
		return "", err
	}
	pids, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return "", fmt.Errorf("kernel.pid_max: %w", err)
	}
	var all []string
	for _, l := range []struct {
		name     string
		resource int
		most     uint64
	}{
		{"nofile", unix.RLIMIT_NOFILE, 1 << 20},
		// podman lowers its own to this by itself.
		{"nproc", unix.RLIMIT_NPROC, pids},
	} {
		var limit unix.Rlimit
		if err := unix.Getrlimit(l.resource, &limit); err != nil {
			return "", fmt.Errorf("read the limit of %s: %w", l.name, err)
		}
		most := min(limit.Max, l.most)
		all = append(all, fmt.Sprintf("\"%s=%d:%d\"", l.name, most, most))
	}
	return strings.Join(all, ", "), nil
}
