// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// StateDir holds one file per run that has something on this host. It is memory, as what it describes.
const StateDir = "/run/plimsoll"

// memoryDir is a file system in memory that every Linux distribution mounts.
const memoryDir = "/dev/shm"

// state is what a run's state file says: enough to find everything the run made after the run itself is gone.
type state struct {
	Name string `json:"name"`
	// Owner is the process that runs it; a state file whose owner lives is left alone.
	Owner owner `json:"owner"`
	// Cgroup is the run's cgroup2 folder: every process of the run is below it.
	Cgroup string `json:"cgroup"`
	// Dirs are folders outside the run's own that it made.
	Dirs []string `json:"dirs"`
}

// owner names a process for all time: a pid alone is reused.
type owner struct {
	PID    int    `json:"pid"`
	Start  string `json:"start"`
	BootID string `json:"boot_id"`
}

// run is one lab's hold on the host: its name, its state file, its cgroup and its folders.
type run struct {
	name string
	// dir keeps configurations and logs with the run.
	dir    string
	cgroup *cgroup

	mu    sync.Mutex // guards state
	state state
}

// newRun writes the state file, then makes what stands in it.
func newRun(name, dir string) (*run, error) {
	root, err := clusters.Cgroup2Mount()
	if err != nil {
		return nil, err
	}
	me, err := processOwner(os.Getpid())
	if err != nil {
		return nil, err
	}
	r := &run{name: name, dir: dir, state: state{Name: name, Owner: me, Cgroup: filepath.Join(root, "plimsoll-"+name)}}
	if err := os.MkdirAll(StateDir, 0o755); err != nil {
		return nil, fmt.Errorf("make %s: %w", StateDir, err)
	}
	if _, err := os.Stat(r.stateFile()); err == nil {
		return nil, fmt.Errorf("a run named %s stands in %s already: plimsoll clean removes what is left of it", name, StateDir)
	}
	// A folder that is there already is not ours to remove.
	if _, err := os.Stat(r.state.Cgroup); err == nil {
		return nil, fmt.Errorf("cgroup %s is there already: plimsoll clean removes what a run left", r.state.Cgroup)
	}
	if err := r.save(); err != nil {
		return nil, err
	}
	if r.cgroup, err = newCgroup(r.state.Cgroup); err != nil {
		return nil, errors.Join(err, r.close(context.Background()))
	}
	return r, nil
}

func (r *run) stateFile() string { return filepath.Join(StateDir, r.name+".json") }

// save writes the state file whole: a reader sees the old one or the new one.
func (r *run) save() error {
	b, err := json.MarshalIndent(r.state, "", "  ")
	if err != nil {
		return err
	}
	tmp := filepath.Join(StateDir, "."+r.name)
	if err := os.WriteFile(tmp, append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("write the state file: %w", err)
	}
	return os.Rename(tmp, r.stateFile())
}

// memory makes a folder in memory, recorded before it exists.
func (r *run) memory(name string) (string, error) {
	dir := filepath.Join(memoryDir, "plimsoll-"+r.name+"-"+name)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.state.Dirs = append(r.state.Dirs, dir)
	if err := r.save(); err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("make a folder in memory: %w", err)
	}
	return dir, nil
}

// close removes all that the run made, whatever state it is in.
func (r *run) close(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state.remove(ctx, r.stateFile())
}

// remove kills what runs, removes cgroups and folders, and last the state file: it stays when something could not go.
func (s state) remove(ctx context.Context, file string) error {
	var errs []error
	if s.Cgroup != "" {
		errs = append(errs, (&cgroup{dir: s.Cgroup}).remove(ctx))
	}
	for _, d := range s.Dirs {
		errs = append(errs, os.RemoveAll(d))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return os.Remove(file)
}

// Clean removes what runs left behind whose process is gone, and tells each by report. Runs that are alive are told and
// left alone.
func Clean(ctx context.Context, report func(string)) error {
	files, err := filepath.Glob(filepath.Join(StateDir, "*.json"))
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range files {
		b, err := os.ReadFile(f)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		var s state
		if err := json.Unmarshal(b, &s); err != nil {
			errs = append(errs, fmt.Errorf("state file %s is damaged, remove it by hand: %w", f, err))
			continue
		}
		if err := s.check(); err != nil {
			errs = append(errs, fmt.Errorf("state file %s: %w", f, err))
			continue
		}
		if s.Owner.alive() {
			report(fmt.Sprintf("%s: running as process %d, left alone", s.Name, s.Owner.PID))
			continue
		}
		if err := s.remove(ctx, f); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", s.Name, err))
			continue
		}
		report(fmt.Sprintf("%s: removed", s.Name))
	}
	return errors.Join(errs...)
}

// check refuses a state file that names what no run of ours would have made: clean runs as root.
func (s state) check() error {
	if s.Cgroup != "" && !strings.HasPrefix(filepath.Base(s.Cgroup), "plimsoll-") {
		return fmt.Errorf("cgroup %q is not of this program's making", s.Cgroup)
	}
	for _, d := range s.Dirs {
		if filepath.Dir(d) != memoryDir || !strings.HasPrefix(filepath.Base(d), "plimsoll-") {
			return fmt.Errorf("folder %q is not of this program's making", d)
		}
	}
	return nil
}

func processOwner(pid int) (owner, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return owner{}, err
	}
	start, err := startTime(pid)
	if err != nil {
		return owner{}, err
	}
	return owner{PID: pid, Start: start, BootID: strings.TrimSpace(string(boot))}, nil
}

func (o owner) alive() bool {
	now, err := processOwner(o.PID)
	return err == nil && now == o
}

// startTime is field 22 of /proc/PID/stat, in clock ticks since boot (proc(5)). The command's name may hold blanks and
// brackets, so fields are counted from its last bracket.
func startTime(pid int) (string, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return "", err
	}
	rest := string(b)
	if i := strings.LastIndexByte(rest, ')'); i >= 0 {
		rest = rest[i+1:]
	}
	fields := strings.Fields(rest)
	if len(fields) < 20 {
		return "", fmt.Errorf("/proc/%d/stat has too few fields", pid)
	}
	return fields[19], nil
}

// poll calls f every 10 ms until it is true, and names what was awaited when ctx ends first.
func poll(ctx context.Context, what string, f func() (bool, error)) error {
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for {
		ok, err := f()
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			if err != nil {
				return fmt.Errorf("wait for %s: %w (%w)", what, context.Cause(ctx), err)
			}
			return fmt.Errorf("wait for %s: %w", what, context.Cause(ctx))
		case <-t.C:
		}
	}
}
