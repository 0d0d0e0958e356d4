// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
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
	for _, program := range []string{"apt-get", "dpkg-deb", "tar"} {
		if _, err := exec.LookPath(program); err != nil {
			return "", fmt.Errorf("%s is not here: on this distribution install Docker or podman instead", program)
		}
	}
	report("unpacking a container engine: " + strings.Join(packages, ", "))
	root, debs, lists := filepath.Join(dir, "root"), filepath.Join(dir, "debs"), filepath.Join(dir, "lists")
	if err := os.RemoveAll(root); err != nil {
		return "", err
	}
	for _, d := range []string{filepath.Join(debs, "partial"), filepath.Join(lists, "partial"), filepath.Join(root, "etc"), filepath.Join(root, "usr")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return "", err
		}
	}
	// Packages from before the merge of /usr have /lib and /sbin of their own.
	for _, name := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := errors.Join(os.MkdirAll(filepath.Join(root, "usr", name), 0o755), os.Symlink("usr/"+name, filepath.Join(root, name))); err != nil {
			return "", err
		}
	}
	apt := []string{"-q", "-o", "Dir::State::lists=" + lists, "-o", "Dir::Cache::archives=" + debs, "-o", "APT::Sandbox::User=root", "-o", "Debug::NoLocking=1"}
	install := append([]string{"install", "--download-only", "--yes", "--no-install-recommends", "--reinstall"}, packages...)
	for _, args := range [][]string{{"update"}, install} {
		if err := runQuiet(exec.CommandContext(ctx, "apt-get", append(apt[:len(apt):len(apt)], args...)...)); err != nil {
			return "", err
		}
	}
	found, err := filepath.Glob(filepath.Join(debs, "*.deb"))
	if err != nil {
		return "", err
	}
	for _, deb := range found {
		if err := extract(ctx, deb, root); err != nil {
			return "", err
		}
	}
	if err := errors.Join(os.RemoveAll(debs), os.RemoveAll(lists)); err != nil {
		return "", err
	}
	return dir, os.WriteFile(stamp, nil, 0o644)
}

// extract lays a package's files below root, through the links of a merged /usr.
func extract(ctx context.Context, deb, root string) error {
	unpack := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	lay := exec.CommandContext(ctx, "tar", "--extract", "--keep-directory-symlink", "--directory", root)
	pipe, err := unpack.StdoutPipe()
	if err != nil {
		return err
	}
	lay.Stdin = pipe
	if err := unpack.Start(); err != nil {
		return err
	}
	return errors.Join(runQuiet(lay), unpack.Wait())
}

// runQuiet runs a command; its error carries the command's line and the end of what it said.
func runQuiet(cmd *exec.Cmd) error {
	out, err := cmd.CombinedOutput()
	if err != nil {
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, lines[len(lines)-1])
	}
	return nil
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
