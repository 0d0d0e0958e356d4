// SPDX-License-Identifier: Apache-2.0

package meters

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Memory is what processes hold, in bytes.
type Memory struct {
	RSS       int64 // resident pages; those that several processes share count once for each
	PSS       int64 // resident pages, shared ones divided among those that share them
	Anonymous int64 // resident pages without a file behind them: heap and stacks
	Processes int   // how many were read
}

// ReadMemory returns the memory of all processes in a cgroup2 folder and below it. It walks their page tables, which takes
// milliseconds for a large process: read it outside of intervals that are timed.
func ReadMemory(folder string) (Memory, error) {
	var sum Memory
	err := filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			if path != folder && errors.Is(err, os.ErrNotExist) {
				return nil // a folder that was removed meanwhile
			}
			return err
		}
		if !entry.IsDir() {
			return nil
		}
		return sum.addFolder(path)
	})
	if err != nil {
		return Memory{}, fmt.Errorf("read memory: %w", err)
	}
	return sum, nil
}

// addFolder adds the processes that are in one folder itself.
func (m *Memory) addFolder(folder string) error {
	content, err := os.ReadFile(filepath.Join(folder, "cgroup.procs"))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(content)) {
		pid, err := strconv.Atoi(strings.TrimSpace(line))
		if err != nil {
			return fmt.Errorf("%s/cgroup.procs: %w", folder, err)
		}
		if err := m.addProcess(pid); err != nil {
			return err
		}
	}
	return nil
}

// addProcess adds one process, unless it has ended.
func (m *Memory) addProcess(pid int) error {
	// Linux 4.14 or newer.
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	p, err := parseRollup(string(content))
	if err != nil {
		return fmt.Errorf("/proc/%d/smaps_rollup: %w", pid, err)
	}
	m.RSS += p.RSS
	m.PSS += p.PSS
	m.Anonymous += p.Anonymous
	m.Processes++
	return nil
}

// parseRollup reads the text of /proc/PID/smaps_rollup (proc_pid_smaps(5)).
func parseRollup(text string) (Memory, error) {
	m := Memory{Processes: 1}
	fields := map[string]*int64{"Rss": &m.RSS, "Pss": &m.PSS, "Anonymous": &m.Anonymous}
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		into, ok := fields[name]
		if !ok {
			continue
		}
		kilobytes, err := strconv.ParseUint(strings.TrimSpace(strings.TrimSuffix(value, "kB")), 10, 52)
		if err != nil {
			return Memory{}, fmt.Errorf("%s: %w", name, err)
		}
		*into = int64(kilobytes) << 10
		delete(fields, name)
	}
	if len(fields) > 0 {
		return Memory{}, fmt.Errorf("not all of Rss, Pss and Anonymous")
	}
	return m, nil
}
