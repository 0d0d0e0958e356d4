// SPDX-License-Identifier: Apache-2.0

package meters

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// cgroups reads the CPU time of the site's pods and processes by their cgroup2 folders, dead processes included. The kernel
// adds up the same run time that it schedules by, to the microsecond, and does so without the cpu controller
// (kernel/cgroup/rstat.c). A process that is running at that moment is charged up to its last scheduler tick.
type cgroups struct{}

var _ Meter = cgroups{}

func (cgroups) Name() string { return "cgroups" }
func (cgroups) Doc() string {
	return "CPU of client, servers, proxy and control plane, exact, from usage_usec of their cgroup2 folders"
}

func (cgroups) read(site Site, r *Reading) (err error) {
	if r.client, err = Usage(site.Client); err != nil {
		return err
	}
	if r.server, err = Usage(site.Servers...); err != nil {
		return err
	}
	if r.proxy, err = Usage(site.Proxy); err != nil {
		return err
	}
	r.harness, err = Usage(site.Harness...)
	return err
}

func (cgroups) since(before, after *Reading, cpu *CPU) {
	cpu.Client = after.client - before.client
	cpu.Server = after.server - before.server
	cpu.Proxy = after.proxy - before.proxy
	cpu.Harness += after.harness - before.harness
}

// Usage returns the CPU time used in cgroup2 folders and all below them. An empty name is no folder.
func Usage(folders ...string) (time.Duration, error) {
	var sum time.Duration
	for _, folder := range folders {
		if folder == "" {
			continue
		}
		file := filepath.Join(folder, "cpu.stat")
		content, err := os.ReadFile(file)
		if err != nil {
			return 0, err
		}
		used, err := parseUsage(string(content))
		if err != nil {
			return 0, fmt.Errorf("%s: %w", file, err)
		}
		sum += used
	}
	return sum, nil
}

// parseUsage takes usage_usec from the text of cpu.stat.
func parseUsage(cpuStat string) (time.Duration, error) {
	for line := range strings.Lines(cpuStat) {
		value, ok := strings.CutPrefix(strings.TrimSpace(line), "usage_usec ")
		if !ok {
			continue
		}
		microseconds, err := strconv.ParseUint(value, 10, 63)
		if err != nil || microseconds > math.MaxInt64/1000 {
			return 0, fmt.Errorf("usage_usec %q is not a time", value)
		}
		return time.Duration(microseconds) * time.Microsecond, nil
	}
	return 0, fmt.Errorf("no usage_usec")
}
