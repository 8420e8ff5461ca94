# shellcheck shell=bash
# Any machine: nothing to load. Copy this file to launch/sites/NAME.sh for yours, and name it with launcher.site=NAME.

site_environment() {
    :
}
