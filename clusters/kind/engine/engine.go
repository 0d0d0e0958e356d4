// SPDX-License-Identifier: Apache-2.0

// Package engine is a container engine for machines that have none: podman, unpacked from the distribution's packages into a
// cache and run in namespaces of its own, so that nothing of it reaches the host's network, rules, mounts or packages.
package engine

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
)

// Name names the engine in state files, its cgroup among them.
const Name = "engine"

// HoldCommand is the hidden subcommand that this program runs as to hold the engine's namespaces.
const HoldCommand = "engine-hold"

// An Engine is a container engine that kind can use.
type Engine struct {
	// Kind is docker or podman.
	Kind string
	// Own is true for the engine that this package started.
	Own bool
	// Path is the folder of the engine's command where that is not on everybody's PATH; empty for the host's own.
	Path string
}

// ErrNone is returned where no container engine answers.
var ErrNone = errors.New("no container engine answers here: start Docker or podman, or make kind-engine")

// answerLimit bounds how long an engine may take to answer.
const answerLimit = 10 * time.Second

// Find is the engine that answers: the one that Start started, else Docker, else podman. The error is ErrNone when none does.
func Find(ctx context.Context) (Engine, error) {
	if running() {
		return own(), nil
	}
	return findHost(ctx)
}

// own is the engine that Start starts.
func own() Engine { return Engine{Kind: "podman", Own: true, Path: commandDir()} }

// findHost is the engine of the host itself.
func findHost(ctx context.Context) (Engine, error) {
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	for _, kind := range []string{"docker", "podman"} {
		if exec.CommandContext(ctx, kind, "ps", "--quiet").Run() == nil {
			return Engine{Kind: kind}, nil
		}
	}
	return Engine{}, ErrNone
}

// Command is the engine's command with args.
func (e Engine) Command(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, filepath.Join(e.Path, e.Kind), args...)
}

// Root is the folder where the engine keeps containers.
func (e Engine) Root(ctx context.Context) (string, error) {
	format := map[string]string{"docker": "{{.DockerRootDir}}", "podman": "{{.Store.GraphRoot}}"}[e.Kind]
	var said strings.Builder
	cmd := e.Command(ctx, "info", "--format", format)
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s info: %w: %s", e.Kind, err, strings.TrimSpace(said.String()))
	}
	return strings.TrimSpace(string(out)), nil
}

// commandDir holds the engine's podman command while it runs.
func commandDir() string { return filepath.Join(host.StateDir, Name) }

// running says whether the process that holds the namespaces lives.
func running() bool {
	_, alive := host.Owner(Name)
	return alive
}

// Start unpacks the engine into cache unless it is there, and starts it. Nothing is started where one answers: the host's own, or one that
// Start started before. report is told what is being done.
func Start(ctx context.Context, cache string, report func(string)) error {
	if os.Geteuid() != 0 {
		return errors.New("an engine makes namespaces and mounts: run it as root (sudo)")
	}
	if running() {
		report("the engine runs already")
		return nil
	}
	if e, err := findHost(ctx); err == nil {
		report(e.Kind + " answers here, and kind can use it: no engine of our own is started")
		return nil
	}
	dir, err := unpack(ctx, cache, report)
	if err != nil {
		return err
	}
	// What an engine left that was killed.
	if err := Stop(ctx); err != nil {
		return err
	}
	return start(ctx, dir, report)
}

// start starts the process that holds the namespaces and leaves it running.
func start(ctx context.Context, dir string, report func(string)) (err error) {
	if err := writeConfiguration(dir); err != nil {
		return err
	}
	// From here on Stop finds something to do.
	if err := os.MkdirAll(commandDir(), 0o755); err != nil {
		return err
	}
	run, err := host.New(Name, dir)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, Stop(context.WithoutCancel(ctx)))
		}
	}()
	pid, err := startHolder(run)
	if err != nil {
		return fmt.Errorf("start the engine: %w", err)
	}
	if err := run.HandOver(pid); err != nil {
		return err
	}
	if err := writeCommand(run, pid); err != nil {
		return err
	}
	// What an earlier engine's containers left in the store is of no use to anybody.
	e := own()
	for _, args := range [][]string{{"rm", "--all", "--force", "--volumes"}, {"volume", "prune", "--force"}} {
		if err := host.Quietly(e.Command(ctx, args...)); err != nil {
			return err
		}
	}
	report("a container engine runs: podman, in namespaces of its own; plimsoll engine stop ends it")
	return nil
}

// startHolder starts this program as the process that holds the namespaces and returns its pid once they stand.
func startHolder(run *host.Run) (int, error) {
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	log, err := os.Create(filepath.Join(run.Dir, "engine.log"))
	if err != nil {
		return 0, err
	}
	defer log.Close()
	group, err := os.Open(run.Cgroup.Dir)
	if err != nil {
		return 0, err
	}
	defer group.Close()
	read, write, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer read.Close()
	// Subtle: no context, because the engine outlives this command; a session of its own, because it outlives the terminal.
	cmd := exec.Command(self, HoldCommand, run.Dir)
	cmd.Stdout, cmd.Stderr = write, log
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:      true,
		Cloneflags:  syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC,
		UseCgroupFD: true, CgroupFD: int(group.Fd()),
	}
	err = cmd.Start()
	write.Close()
	if err != nil {
		return 0, err
	}
	if line, err := bufio.NewReader(read).ReadString('\n'); err != nil || line != ready {
		cmd.Wait()
		said, _ := os.ReadFile(log.Name())
		return 0, fmt.Errorf("its namespaces do not stand: %s", strings.TrimSpace(string(said)))
	}
	pid := cmd.Process.Pid
	return pid, cmd.Process.Release()
}

// Stop ends the engine and every container in it, and removes all of it but the cache. It is no error where there is none of ours, and then
// nothing of another one is touched.
func Stop(ctx context.Context) error {
	if _, err := os.Stat(commandDir()); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if running() {
		// In good order, so that containers' storage is unmounted; what is left after that dies with the cgroup.
		orderly, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		own().Command(orderly, "rm", "--all", "--force", "--volumes", "--time", "0").Run()
	}
	if err := errors.Join(removeContainers(ctx), host.Remove(ctx, Name)); err != nil {
		return err
	}
	// The folder over which Hold mounts, unless it is a link or holds something: that is not Hold's.
	unix.Rmdir(imageCache)
	return os.RemoveAll(commandDir())
}

// Clean removes what an engine left whose own process was killed, and says whether there was something.
func Clean(ctx context.Context) (bool, error) {
	if _, err := os.Stat(commandDir()); err != nil || running() {
		return false, nil
	}
	return true, Stop(ctx)
}

// removeContainers kills what still runs in containers, and removes the folders that podman leaves in the hierarchies of cgroup v1.
// No other podman's are there: Start starts nothing where one answers.
func removeContainers(ctx context.Context) error {
	root, err := clusters.Cgroup2Mount()
	if err != nil {
		return err
	}
	if err := (&host.Cgroup{Dir: filepath.Join(root, cgroupParent)}).Remove(ctx); err != nil {
		return err
	}
	parents, err := filepath.Glob("/sys/fs/cgroup/*/" + cgroupParent)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, host.SettleLimit)
	defer cancel()
	return host.Poll(ctx, "the cgroups of containers to be empty", func() (bool, error) {
		var errs []error
		for _, parent := range parents {
			errs = append(errs, removeEmpty(parent))
		}
		err := errors.Join(errs...)
		return err == nil, err
	})
}

// removeEmpty removes a folder and all below it, deepest first. One that is gone is no error.
func removeEmpty(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	for _, d := range slices.Backward(dirs) {
		err = errors.Join(err, os.Remove(d))
	}
	return err
}

// cgroupParent is podman's folder for containers in each hierarchy.
const cgroupParent = "libpod_parent"

// writeCommand writes the podman command that enters the engine's namespaces.
func writeCommand(run *host.Run, pid int) error {
	// The cgroup first: whatever podman starts is in it then, and dies with it.
	script := fmt.Sprintf("#!/bin/sh\necho $$ >'%s/cgroup.procs' || exit 1\n"+
		"exec nsenter --target %d --net --mount --ipc -- /bin/sh -c 'cd \"$0\" && exec podman \"$@\"' \"$PWD\" \"$@\"\n", run.Cgroup.Dir, pid)
	return os.WriteFile(filepath.Join(commandDir(), "podman"), []byte(script), 0o755)
}
