// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"strings"
	"testing"
)

// A reader of results sees what makes this machine's kernel slow to enter.
func TestEnvironmentNamesTheCPUAndItsMitigations(t *testing.T) {
	env := describeHost(t.Context(), t.TempDir())
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	if env.CPU == "" && strings.Contains(string(info), "model name") || !strings.Contains(string(info), env.CPU) {
		t.Errorf("the CPU is %q", env.CPU)
	}
	const meltdown = "/sys/devices/system/cpu/vulnerabilities/meltdown"
	if b, err := os.ReadFile(meltdown); err == nil {
		if got, pti := env.Extra["mitigation of meltdown"], strings.Contains(string(b), "PTI"); (got == "PTI") != pti {
			t.Errorf("%s says %q, the environment %q", meltdown, strings.TrimSpace(string(b)), got)
		}
	}
	if got := env.Extra["TLB with address space numbers (pcid)"]; strings.Contains(string(info), " pcid ") != (got == "yes") {
		t.Errorf("pcid is said to be %q", got)
	}
}
