// SPDX-License-Identifier: Apache-2.0

// Package host is what a run holds on this machine: its state file, cgroups, processes and folders, which go when the run
// ends, whatever way it ends.
package host

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

// MemoryDir is a file system in memory that every Linux distribution mounts.
const MemoryDir = "/dev/shm"

// CacheVariable names the environment variable of the cache's folder.
const CacheVariable = "PLIMSOLL_CACHE"

// CacheDir is where what takes long to build is kept from one checkout to the next: the folder that the environment names, or one in the user's
// cache. Under sudo that is root's, so the Makefile names the caller's.
func CacheDir() (string, error) {
	if dir := os.Getenv(CacheVariable); dir != "" {
		return dir, nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the user's cache: %w", err)
	}
	return filepath.Join(dir, "plimsoll"), nil
}

// state is what a run's state file says: enough to find everything the run made after the run itself is gone.
type state struct {
	Name string `json:"name"`
	// Owner is the process that runs it; a state file whose owner lives is left alone.
	Owner owner `json:"owner"`
	// Cgroup is the run's cgroup2 folder: every process of the run is below it.
	Cgroup string `json:"cgroup"`
	// Dirs are folders outside the run's own that it made.
	Dirs []string `json:"dirs"`
	// Containers are what the run made in a container engine.
	Containers Containers `json:"containers,omitzero"`
}

// Containers are what a run made in a container engine, by name.
type Containers struct {
	Clusters []string `json:"clusters,omitempty"`
	Images   []string `json:"images,omitempty"`
	Networks []string `json:"networks,omitempty"`
}

// owner names a process for all time: a pid alone is reused.
type owner struct {
	PID    int    `json:"pid"`
	Start  string `json:"start"`
	BootID string `json:"boot_id"`
}

// Run is one run's hold on this machine.
type Run struct {
	Name string
	// Dir keeps configurations and logs with the run.
	Dir string
	// Cgroup is the cgroup2 folder of all that the run starts.
	Cgroup *Cgroup

	mu    sync.Mutex // guards state
	state state
}

// New makes the run's cgroup, and before it the state file by which Clean finds it. Everything carries the run's name. Close it.
func New(name, dir string) (*Run, error) {
	root, err := clusters.Cgroup2Mount()
	if err != nil {
		return nil, err
	}
	me, err := processOwner(os.Getpid())
	if err != nil {
		return nil, err
	}
	r := &Run{Name: name, Dir: dir, state: state{Name: name, Owner: me, Cgroup: filepath.Join(root, "plimsoll-"+name)}}
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
	if r.Cgroup, err = NewCgroup(r.state.Cgroup); err != nil {
		return nil, errors.Join(err, r.Close(context.Background()))
	}
	return r, nil
}

func (r *Run) stateFile() string { return filepath.Join(StateDir, r.Name+".json") }

// save writes the state file whole: a reader sees the old one or the new one.
func (r *Run) save() error {
	b, err := json.MarshalIndent(r.state, "", "  ")
	if err != nil {
		return err
	}
	tmp := filepath.Join(StateDir, "."+r.Name)
	if err := os.WriteFile(tmp, append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("write the state file: %w", err)
	}
	return os.Rename(tmp, r.stateFile())
}

// Memory makes a folder in memory, recorded before it exists, and returns its path.
func (r *Run) Memory(name string) (string, error) {
	dir := filepath.Join(MemoryDir, "plimsoll-"+r.Name+"-"+name)
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

// Record notes what is going to be made in a container engine.
func (r *Run) Record(c Containers) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := &r.state.Containers
	all.Clusters = append(all.Clusters, c.Clusters...)
	all.Images = append(all.Images, c.Images...)
	all.Networks = append(all.Networks, c.Networks...)
	return r.save()
}

// Recorded is all that was noted.
func (r *Run) Recorded() Containers {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state.Containers
}

// HandOver makes process pid the run's owner: the run lives as long as that process, and Remove ends it.
func (r *Run) HandOver(pid int) error {
	owner, err := processOwner(pid)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.state.Owner = owner
	return r.save()
}

// Owner is the process of the run of that name, and whether it lives.
func Owner(name string) (pid int, alive bool) {
	s, err := readState(filepath.Join(StateDir, name+".json"))
	if err != nil {
		return 0, false
	}
	return s.Owner.PID, s.Owner.alive()
}

// Remove ends the run of that name, whoever its owner is, and removes all that it made. One that is not there is no error.
func Remove(ctx context.Context, name string) error {
	file := filepath.Join(StateDir, name+".json")
	s, err := readState(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return s.remove(ctx, file)
}

// readState reads a state file and refuses one that names what no run of ours would have made: those who read it are root.
func readState(file string) (state, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return state{}, err
	}
	var s state
	if err := json.Unmarshal(b, &s); err != nil {
		return state{}, fmt.Errorf("state file %s is damaged, remove it by hand: %w", file, err)
	}
	if err := s.check(); err != nil {
		return state{}, fmt.Errorf("state file %s: %w", file, err)
	}
	return s, nil
}

// Close removes all that the run made, whatever state it is in.
func (r *Run) Close(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state.remove(ctx, r.stateFile())
}

// remove kills what runs, removes cgroups and folders, and last the state file: it stays when something could not go.
func (s state) remove(ctx context.Context, file string) error {
	var errs []error
	if s.Cgroup != "" {
		errs = append(errs, (&Cgroup{Dir: s.Cgroup}).Remove(ctx))
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
// left alone. remove deletes what a run made in a container engine, before the rest of it goes.
func Clean(ctx context.Context, remove func(context.Context, Containers) error, report func(string)) error {
	files, err := filepath.Glob(filepath.Join(StateDir, "*.json"))
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range files {
		s, err := readState(f)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if s.Owner.alive() {
			report(fmt.Sprintf("%s: running as process %d, left alone", s.Name, s.Owner.PID))
			continue
		}
		if len(s.Containers.Clusters)+len(s.Containers.Images)+len(s.Containers.Networks) > 0 {
			err = remove(ctx, s.Containers)
		}
		if err == nil {
			err = s.remove(ctx, f)
		}
		if err != nil {
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
		if filepath.Dir(d) != MemoryDir || !strings.HasPrefix(filepath.Base(d), "plimsoll-") {
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

// Poll calls f every 10 ms until it is true, and names what was awaited when ctx ends first.
func Poll(ctx context.Context, what string, f func() (bool, error)) error {
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
