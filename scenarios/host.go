// SPDX-License-Identifier: Apache-2.0

package scenarios

import "strings"

// kernelVersion is the major.minor of a kernel release: 6.18 of 6.18.44-1-amd64.
func kernelVersion(release string) string {
	parts := strings.SplitN(release, ".", 3)
	if len(parts) < 2 {
		return release
	}
	minor, _, _ := strings.Cut(parts[1], "-")
	return parts[0] + "." + minor
}
